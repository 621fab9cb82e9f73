"""SentencePiece vocabularies against the library itself and against transformers."""

import io
import json
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.text import load_tokenizer

from .chat_templates import QWEN3

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SYMBOLS = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "<reponame>"]
CORPUS = """\
def quicksort(arr): return arr if len(arr) <= 1 else quicksort(arr[1:])
    for i in range(10):  print(i, "hello world", 'naïve café')
The quick brown fox jumps over the lazy dog, and the dog does not mind at all.
<|im_ start end|> is what the im_start is; <s is not <s> and 0x0A is hex.
人工智能的发展速度令人惊叹 Привет мир
"""
TEXTS = {
    "empty": "",
    "word": "hello",
    "leading spaces": "   hello  world ",
    "one space": " ",
    "spaces": "     ",
    "lines": "a\nb\n\n  c\r\n\td\n",
    "code": "def f(x: int) -> None:\n    return {'a': [1, 2]}  # ok",
    "rare": "龘 𓂀 🫠👩🏽‍🚀 e\u0301 \u00a0 \ufb01 \u2581 x▁y",
    "bytes": "<0x0A> <0xE4><0xBD>",
    "controls": "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n",
    "glued": "a<|im_end|> b <file_sep>c<|im_end|><|im_end|>  d<s></s><unk>",
    "parts": "<|im_ <|im_end <s <s > <file_sep",
    "zero": "a\x00b\x01",
}


def train(directory, **options):
    """A tokenizer.model of some hundred pieces."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(CORPUS.splitlines() * 3),
            "model_writer": stream,
            "model_type": "bpe",
            "vocab_size": 480,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "control_symbols": CONTROL,
            "user_defined_symbols": SYMBOLS,
            "character_coverage": 0.98,
            "hard_vocab_limit": False,
            "minloglevel": 2,
            **options,
        }
    )
    (directory / "tokenizer.model").write_bytes(stream.getvalue())
    return directory


def write_config(directory, **fields):
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
        **fields,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return train(tmp_path_factory.mktemp("sentencepiece")) / "tokenizer.model"


CONFIGS = {
    "plain": {},
    "legacy": {"legacy": True},
    "no prefix": {"add_prefix_space": False},
    "extra": {
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True},
            "1": {"content": "<s>", "special": True},
            "2": {"content": "</s>", "special": True},
            "480": {"content": "<think>", "special": False, "normalized": False},
            "481": {"content": "</think>", "special": False, "normalized": False},
            "482": {"content": "<|extra|>", "special": True},
        }
    },
    "json": {},
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, model_file, tmp_path_factory):
    """(ours, transformers' own) of one directory."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("pair")
    shutil.copy(model_file, directory)
    write_config(directory, **CONFIGS[request.param])
    theirs = LlamaTokenizer.from_pretrained(directory)
    if request.param == "json":
        (directory / "tokenizer.model").unlink()
        (directory / "tokenizer.json").write_text(theirs.backend_tokenizer.to_str())
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    return load_tokenizer(directory), theirs


def ids_of(theirs, text):
    return theirs(text, add_special_tokens=False)["input_ids"]


surface = st.sampled_from([*CONTROL, *SYMBOLS, "<s>", "<think>", "<0x0A>", " ", "  ", "\n", "▁"])
any_text = st.lists(st.one_of(st.text(max_size=10), surface), max_size=8).map("".join)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_give_the_ids_of_transformers_and_come_back_as_there(pair, text):
    ours, theirs = pair
    ids = ids_of(theirs, text)
    assert ours.encode(text) == ids
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_any_text_gives_the_ids_of_transformers(pair, text):
    ours, theirs = pair
    ids = ids_of(theirs, text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids)
    plain = ours.encode(text, allow_special=False)
    assert not set(plain) & set(ours.added_tokens.values())
    if "▁" not in text and not text.startswith(" "):
        assert ours.decode(plain) == text


def test_sizes_and_names_are_those_of_transformers(pair):
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.added_tokens == theirs.added_tokens_encoder
    if theirs.pad_token is not None:
        assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=30) | st.sampled_from([*TEXTS.values()]))
def test_plain_text_gives_the_ids_of_sentencepiece(model_file, loaded, text):
    """But where it starts with a space, to which transformers adds none, or holds symbols."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for symbol in SYMBOLS:
        text = text.replace(symbol, "")
    text = text.lstrip(" ▁")
    assert loaded.encode(text, allow_special=False) == library.encode(text)


@settings(max_examples=500, deadline=None)
@given(
    ids=st.lists(st.integers(0, 479) | st.integers(11, 266), max_size=20), size=st.integers(1, 4)
)
def test_any_ids_decode_as_in_sentencepiece_also_streamed(model_file, loaded, ids, size):
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids = [i for i in ids if i not in loaded.special_tokens.values()]
    if ids[:1] == [loaded.token_to_id("<0x20>")]:
        return  # A space that transformers takes for the one before a text, the library does not.
    expected = library.decode(ids)
    assert loaded.decode(ids) == expected
    stream = loaded.stream()
    parts = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join([*parts, stream.finish()]) == expected


@pytest.fixture(scope="module")
def loaded(model_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("loaded")
    shutil.copy(model_file, directory)
    (directory / "chat_template.jinja").write_text(QWEN3)
    return load_tokenizer(write_config(directory))


def test_characters_that_are_bytes_stream_whole(loaded):
    ids = loaded.encode("a龘b𓂀")
    stream = loaded.stream()
    shown = [stream.push(token) for token in ids]
    assert "".join(shown) == "a龘b𓂀"
    assert "" in shown and "龘" in shown and "𓂀" in shown
    assert stream.push(ids[-4:-1]) == "" and stream.finish() == "\ufffd" * 3


def test_a_continuation_keeps_its_first_space(loaded):
    ids = loaded.encode("hello world")[1:]
    ids = loaded.encode(" world", allow_special=False, continues=True)
    stream = loaded.stream(continues=True)
    assert stream.push(ids) == " world"
    assert loaded.decode(ids) == "world"
    assert loaded.encode("x", allow_special=False, continues=True) != loaded.encode("x")
    with pytest.raises(UserError, match="continues: needs allow_special=False"):
        loaded.encode("x", continues=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_harmless_chats_have_the_same_ids_with_and_without_allow_special(
    model_file, tmp_path, legacy
):
    shutil.copy(model_file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(QWEN3)
    tokenizer = load_tokenizer(write_config(tmp_path, legacy=legacy))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  hello\nworld"},
    ]
    strict, free = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, allow_special=allow)
        for allow in (False, True)
    )
    assert strict == free
    messages[1]["content"] = "<|im_end|><s>"
    strict = tokenizer.apply_chat_template(messages, allow_special=False)
    assert strict.count(tokenizer.special_tokens["<|im_end|>"]) == 2
    assert tokenizer.special_tokens["<s>"] not in strict


def test_a_control_token_that_merges_reach_cannot_be_typed(model_file, tmp_path):
    """tokenizer.json files made by older converters have merges to every piece."""
    shutil.copy(model_file, tmp_path)
    values = json.loads(load_tokenizer(write_config(tmp_path)).vocabulary.pipeline.to_str())
    values["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    values["model"]["vocab"]["<s"] = max(values["model"]["vocab"].values()) + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a<s>b", allow_special=False)
    assert tokenizer.token_to_id("<s>") not in ids
    assert tokenizer.decode(ids) == "a<s>b"
    assert tokenizer.token_to_id("<s>") in tokenizer.encode("a<s>b")


def test_the_beginning_and_the_end_are_put_around_a_text_that_asks_for_them(model_file, tmp_path):
    from transformers import LlamaTokenizer

    shutil.copy(model_file, tmp_path)
    write_config(tmp_path, add_bos_token=True, add_eos_token=True)
    ours, theirs = load_tokenizer(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("hello", add_special_tokens=True)
    assert ids == theirs("hello")["input_ids"]
    assert ids[1:-1] == ours.encode("hello")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 400}, "model_type is not BPE"),
        ({"byte_fallback": False, "vocab_size": 200}, "it has no piece for each byte"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text (precompiled_charsmap)"),
        ({"remove_extra_whitespaces": True}, "it removes spaces (remove_extra_whitespaces)"),
        ({"treat_whitespace_as_suffix": True}, "it puts spaces behind words (treat_whitespace"),
    ],
)
def test_a_model_that_reads_text_in_another_way_is_refused(tmp_path, options, reason):
    with pytest.raises(UserError) as caught:
        load_tokenizer(train(tmp_path, **options))
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.model'}: {reason}")


@pytest.mark.parametrize("data", [b"", b"hello world\n", b"\x0a\xff", b"version https://git-lfs"])
def test_a_broken_file_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match="not a SentencePiece model; download"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"legacy": "yes"}, "tokenizer_config.json: legacy must be true or false"),
        ({"add_bos_token": True, "bos_token": None}, "add_bos_token needs a bos_token"),
        ({"added_tokens_decoder": {"999": {"content": "<x>"}}}, "added token '<x>' has id 999"),
        ({"added_tokens_decoder": {"7": {"content": "<s>"}}}, "added token '<s>' has id 7"),
    ],
)
def test_a_broken_configuration_is_refused(model_file, tmp_path, fields, reason):
    shutil.copy(model_file, tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(write_config(tmp_path, **fields))
    assert reason in str(caught.value)
