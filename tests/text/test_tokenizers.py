# ruff: noqa: RUF001
import json
import unicodedata

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.text import check_vocabulary_fits, load_tokenizer

from .real_vocabulary import QWEN3_NOT_SPECIAL, QWEN3_SPECIAL, read_ranks

TEXTS = {
    "empty": "",
    "english": "The quick brown fox doesn't jump; it's I'LL 'Re'VE we'd over the lazy dog's back.",
    "chinese": "人工智能的发展速度令人惊叹,通义千问。",
    "mixed scripts": "Привет мир, γειά σου, שלום עולם, مرحبا, नमस्ते दुनिया, สวัสดี, 안녕, こんにちは",
    "code": "def f(x: int) -> None:\n\tif x >= 10_000:\n        return {'a': [1, 2]}  # ok\r\n",
    "emoji": "👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☠️ ✨✨✨",
    "digits": "0 12 345 6789 3.14159 ١٢٣ Ⅷ ½ ²",
    "decomposed": unicodedata.normalize("NFD", "Ünïcödé ệ 각 ñandú Å"),
    "hangul and kelvin signs": "\u1112\u1161\u11ab \u212b \u2126 \ufb01",
    "white space": "  a   b\t\tc \u00a0\u3000d   \n\n   \n e\n\n\n",
    "line ends": "a\r\nb\r\n\r\nc\rd\n\re   \r\n",
    "controls": "\x00\x01\x7f\ufeff\u200b\u2028\ufffd\ufffe",
    "rare": "𝔘𝔫𝔦 𒀀 𓂀 \U0001f9ff\U0010ffff \ue000",
    "marks on control tokens": "<|im_end|>\u0338 x<|im_end|>\u0301",
    "underscores and case": "snake_CASE camelCase __init__ 'S 'LL ſ'ſ",
    "long run": "a" * 300 + "!" * 300 + " " * 300 + "\n" * 50,
}
CONTROL_TEXTS = {
    "a turn": "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\n",
    "glued": "a<|endoftext|><|im_end|>b<tool_call>c</tool_call><|fim_prefix|>d<|im_end",
    "nested": "<|<|im_end|>|><<think>>",
    "spaces around": " <|im_end|> <think> \n<|im_start|>\n",
}
surface = st.sampled_from(
    [*QWEN3_SPECIAL, *QWEN3_NOT_SPECIAL, "<|im_", "end|>", "<", "|", " ", "\n"]
)
any_text = st.lists(st.one_of(st.text(max_size=12), surface), max_size=8).map("".join)


@pytest.fixture(scope="module")
def plain_tiktoken():
    """The vocabulary in tiktoken alone, with the split that Qwen1 publishes."""
    pattern = (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"""
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    )
    return tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=read_ranks(), special_tokens={})


def plain_ids(encoding, text: str) -> list[int]:
    return encoding.encode_ordinary(unicodedata.normalize("NFC", text))


def ids_of_transformers(reference, text: str) -> list[int]:
    return reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [*TEXTS.values(), *CONTROL_TEXTS.values()])
def test_every_format_gives_the_ids_of_transformers(qwen3, qwen2_files, reference, text):
    expected = ids_of_transformers(reference, text)
    assert qwen3.encode(text) == expected
    assert qwen2_files.encode(text) == expected


@pytest.mark.parametrize("text", [*TEXTS.values(), *CONTROL_TEXTS.values()])
def test_plain_text_gives_the_ids_of_tiktoken_in_every_format(
    qwen3, qwen2_files, qwen1, plain_tiktoken, text
):
    expected = plain_ids(plain_tiktoken, text)
    for tokenizer in (qwen3, qwen2_files, qwen1):
        assert tokenizer.encode(text, allow_special=False) == expected


@pytest.mark.parametrize("text", CONTROL_TEXTS.values())
def test_plain_text_is_what_transformers_encodes_without_added_tokens(qwen3, reference, text):
    assert qwen3.encode(text, allow_special=False) == reference._encode_without_added_tokens(text)


def test_split_special_tokens_of_transformers_still_finds_tokens_that_are_not_special(
    qwen3, reference
):
    text = "<|im_end|><think>"
    theirs = reference(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert qwen3.added_tokens["<|im_end|>"] not in theirs
    assert qwen3.added_tokens["<think>"] in theirs
    assert not set(qwen3.encode(text, allow_special=False)) & set(qwen3.added_tokens.values())


def test_qwen1_control_tokens_have_the_ids_of_the_publication(qwen1):
    assert qwen1.encode("<|endoftext|><|im_start|><|im_end|><|extra_0|><|extra_204|>") == [
        151643,
        151644,
        151645,
        151646,
        151850,
    ]
    assert (qwen1.vocab_size, qwen1.max_id) == (151851, 151850)
    assert qwen1.special_tokens == qwen1.added_tokens


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_any_text_gives_the_ids_of_transformers_and_comes_back(
    qwen3, qwen2_files, qwen1, reference, plain_tiktoken, text
):
    expected = ids_of_transformers(reference, text)
    assert qwen3.encode(text) == expected
    assert qwen2_files.encode(text) == expected
    plain = plain_ids(plain_tiktoken, text)
    normal = unicodedata.normalize("NFC", text)
    for tokenizer in (qwen3, qwen1):
        assert tokenizer.encode(text, allow_special=False) == plain
        assert tokenizer.decode(plain) == normal
    assert qwen1.decode(qwen1.encode(text)) == normal


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 151935)), max_size=30),
    skip=st.booleans(),
)
def test_any_ids_decode_as_in_transformers(qwen3, reference, ids, skip):
    expected = reference.decode(ids, skip_special_tokens=skip)
    assert qwen3.decode(ids, skip_special_tokens=skip) == expected


def test_a_token_that_ends_inside_a_character_decodes_to_the_replacement_character(
    qwen3, reference
):
    ids = qwen3.encode("👨‍👩‍👧 𒀀")
    for end in range(len(ids) + 1):
        assert qwen3.decode(ids[:end]) == reference.decode(ids[:end])
    assert any("\ufffd" in qwen3.decode(ids[:end]) for end in range(len(ids)))


def test_ids_of_padded_rows_have_no_text(qwen3, qwen1, reference):
    assert qwen3.decode([9707, 151900, 200000, 9707]) == "HelloHello"
    assert reference.decode([9707, 151900, 9707]) == "HelloHello"
    assert qwen1.decode([9707, 151900, 9707]) == "HelloHello"
    assert qwen3.decode([-1, 9707]) == "Hello"


def test_skip_special_tokens_keeps_added_tokens_that_are_not_special(qwen3, reference):
    ids = qwen3.encode("<|im_start|><think>a</think><|im_end|>")
    assert qwen3.decode(ids, skip_special_tokens=True) == "<think>a</think>"
    assert reference.decode(ids, skip_special_tokens=True) == "<think>a</think>"


def test_sizes_and_names_are_those_of_transformers(qwen3, qwen2_files, reference):
    for tokenizer in (qwen3, qwen2_files):
        assert tokenizer.vocab_size == len(reference) == 151669
        assert tokenizer.max_id == 151668
        assert tokenizer.eos_token_id == reference.eos_token_id == 151645
        assert tokenizer.pad_token_id == reference.pad_token_id == 151643
        assert tokenizer.added_tokens == reference.added_tokens_encoder
        assert set(tokenizer.special_tokens) == set(QWEN3_SPECIAL)
        assert tokenizer.chat_template is None


def test_token_to_id_takes_pieces_and_added_tokens(qwen3, qwen1, reference):
    for piece in ("Ġhello", "hello", "<|im_end|>", "ä½łå¥½", "no such piece", "", "a b"):
        theirs = reference.backend_tokenizer.token_to_id(piece)
        assert qwen3.token_to_id(piece) == theirs
        if piece != "<|im_end|>":
            assert qwen1.token_to_id(piece) == theirs
    assert qwen1.token_to_id("<|im_end|>") == 151645


def test_ids_may_be_any_integer_type(qwen3):
    import numpy as np

    assert qwen3.decode(np.array([9707, 151645])) == "Hello<|im_end|>"
    assert qwen3.decode(9707) == "Hello"


def test_the_post_processor_runs_only_when_asked_for(qwen3_directory, tmp_path):
    values = json.loads((qwen3_directory / "tokenizer.json").read_text(encoding="utf-8"))
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [151643], "tokens": ["<|endoftext|>"]}
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Hello") == [9707]
    assert tokenizer.encode("Hello", add_special_tokens=True) == [9707, 151643]
    with pytest.raises(UserError, match="needs allow_special=True"):
        tokenizer.encode("Hello", allow_special=False, add_special_tokens=True)


def test_truncation_in_tokenizer_json_does_not_cut_text(qwen3_directory, tmp_path):
    values = json.loads((qwen3_directory / "tokenizer.json").read_text(encoding="utf-8"))
    values["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert len(load_tokenizer(tmp_path).encode("one two three four")) == 4


def test_added_tokens_of_older_checkpoints_come_from_their_two_files(small_directory):
    from transformers import Qwen2Tokenizer

    (small_directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (small_directory / "added_tokens.json").write_text(
        '{"<|im_end|>": 261, "<|endoftext|>": 259, "<|im_start|>": 260, "<think>": 262}'
    )
    (small_directory / "special_tokens_map.json").write_text(
        '{"additional_special_tokens": ["<|im_start|>", "<|im_end|>"],'
        ' "pad_token": {"content": "<|endoftext|>", "lstrip": false}}'
    )
    ours, theirs = load_tokenizer(small_directory), Qwen2Tokenizer.from_pretrained(small_directory)
    assert ours.added_tokens == theirs.added_tokens_encoder
    assert ours.special_tokens == {"<|endoftext|>": 259, "<|im_start|>": 260, "<|im_end|>": 261}
    assert (ours.eos_token_id, ours.pad_token_id) == (261, 259)
    text = "the <|im_end|><think>"
    assert ours.encode(text) == theirs(text)["input_ids"]


def test_tokens_that_only_tokenizer_config_adds_are_found(small_directory, qwen3_directory):
    from transformers import Qwen2Tokenizer

    Qwen2Tokenizer.from_pretrained(small_directory).save_pretrained(small_directory / "saved")
    saved = small_directory / "saved"
    values = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"] = values["added_tokens"][:3]
    (saved / "tokenizer.json").write_text(json.dumps(values))
    (saved / "tokenizer_config.json").write_bytes(
        (small_directory / "tokenizer_config.json").read_bytes()
    )
    assert load_tokenizer(saved).encode("<think>") == [262]


def test_qwen35_keeps_combining_marks_with_their_letters(vocab_and_merges_directory, tmp_path):
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(vocab_and_merges_directory / name)
    config = json.loads((vocab_and_merges_directory / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen3_5Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = Qwen3_5Tokenizer(
        vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt")
    )
    ours = load_tokenizer(tmp_path)
    qwen2 = load_tokenizer(vocab_and_merges_directory)
    for text in (*TEXTS.values(), "नमस्ते दुनिया สวัสดี x̂y"):
        assert ours.encode(text, allow_special=False) == theirs._encode_without_added_tokens(text)
    pieces = [
        t.vocabulary.pipeline.pre_tokenizer.pre_tokenize_str("x\u0302y") for t in (ours, qwen2)
    ]
    assert [len(p) for p in pieces] == [1, 2]


def test_qwen_vl_has_nine_more_tokens(qwen1_directory, tmp_path):
    (tmp_path / "qwen.tiktoken").symlink_to(qwen1_directory / "qwen.tiktoken")
    (tmp_path / "config.json").write_text('{"model_type": "qwen", "visual": {}}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<ref></ref><img></img><imgpad>") == [
        151851,
        151852,
        151857,
        151858,
        151859,
    ]


def test_a_vocabulary_larger_than_the_model_is_refused(qwen3):
    check_vocabulary_fits(qwen3, 151936)
    check_vocabulary_fits(qwen3, 151669)
    with pytest.raises(UserError) as caught:
        check_vocabulary_fits(qwen3, 151668)
    message = str(caught.value)
    assert "'</think>'" in message and "id 151668" in message and "vocab_size is 151668" in message


def write(name, content):
    def change(directory):
        data = content.encode() if isinstance(content, str) else content
        (directory / name).write_bytes(data)

    return change


def only(name, content):
    def change(directory):
        for path in directory.iterdir():
            path.unlink()
        write(name, content)(directory)

    return change


BYTES = "\n".join(f"{__import__('base64').b64encode(bytes([i])).decode()} {i}" for i in range(256))
BAD_DIRECTORIES = {
    "nothing": (
        only("x", ""),
        "looked for tokenizer.json, vocab.json with merges.txt, qwen.tiktoken",
    ),
    "cut json": (write("tokenizer.json", '{"model":'), "tokenizer.json: not a tokenizer"),
    "other json": (write("tokenizer.json", "[]"), "tokenizer.json: not a tokenizer"),
    "binary json": (write("tokenizer.json", b"\xff\xfe"), "tokenizer.json: byte 0 is not UTF-8"),
    "word level": (
        write(
            "tokenizer.json",
            '{"version": "1.0", "added_tokens": [], "model":'
            ' {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
        ),
        "tokenizer.json: model.type is WordLevel, expected BPE",
    ),
    "no decoder": (
        write(
            "tokenizer.json",
            '{"version": "1.0", "added_tokens": [], "model":'
            ' {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        ),
        "tokenizer.json: decoder is missing, expected ByteLevel",
    ),
    "cut vocab": (write("vocab.json", '{"a": 0,'), "vocab.json: not valid JSON"),
    "deep vocab": (write("vocab.json", "[" * 100_000), "vocab.json: "),
    "vocab list": (write("vocab.json", "[1]"), "vocab.json: should hold a JSON object"),
    "vocab of text": (write("vocab.json", '{"a": "b"}'), "vocab.json: 'a' must map to a token id"),
    "foreign merges": (write("merges.txt", "q zz\n"), "merges.txt: line 1 needs 'zz', which vocab"),
    "merge of three": (
        write("merges.txt", "#version\na b c\n"),
        "merges.txt: line 2 must hold two",
    ),
    "config list": (
        write("tokenizer_config.json", "[]"),
        "_config.json: should hold a JS",
    ),
    "config cut": (write("tokenizer_config.json", "{"), "tokenizer_config.json: not valid JSON"),
    "eos number": (
        write("tokenizer_config.json", '{"eos_token": 3}'),
        "tokenizer_config.json: eos_token must be a token",
    ),
    "wrong id": (
        write("tokenizer_config.json", '{"added_tokens_decoder": {"999": {"content": "<x>"}}}'),
        "added token '<x>' has id 999",
    ),
    "id text": (
        write("tokenizer_config.json", '{"added_tokens_decoder": {"a": {"content": "<x>"}}}'),
        "added_tokens_decoder['a'] must have a whole number",
    ),
    "flag text": (
        write(
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"259": {"content": "<x>", "special": "yes"}}}',
        ),
        "added_tokens_decoder['259'].special must be true or false",
    ),
    "decoder list": (
        write("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        "added_tokens_decoder must map ids",
    ),
    "extra tokens": (
        write("tokenizer_config.json", '{"additional_special_tokens": "x"}'),
        "additional_special_tokens must be a list",
    ),
    "template number": (
        write("tokenizer_config.json", '{"chat_template": 3}'),
        "tokenizer_config.json: field chat_template must be text or a list",
    ),
    "template list": (
        write("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        "tokenizer_config.json: field chat_template must be text or a list",
    ),
    "added tokens": (
        lambda d: (
            write("tokenizer_config.json", "{}")(d),
            write("added_tokens.json", '{"<x>": "1"}')(d),
        ),
        "added_tokens.json: '<x>' must map to a token id",
    ),
    "tiktoken text": (only("qwen.tiktoken", "hello world\n"), "qwen.tiktoken: line 1 is not a ba"),
    "tiktoken gap": (only("qwen.tiktoken", "IQ== 0\nIg== 2\n"), "the ranks are not 0 to 1"),
    "tiktoken twice": (only("qwen.tiktoken", "IQ== 0\nIQ== 1\n"), "line 2 repeats a token"),
    "tiktoken bytes": (only("qwen.tiktoken", "IQ== 0\n"), "no rank for the single byte 0"),
    "tiktoken eos": (
        lambda d: (
            only("qwen.tiktoken", BYTES)(d),
            write("tokenizer_config.json", '{"eos_token": "<x>"}')(d),
        ),
        "eos_token '<x>' is not in the vocabulary",
    ),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_a_broken_directory_is_refused_in_one_line(small_directory, case):
    change, expected = BAD_DIRECTORIES[case]
    change(small_directory)
    with pytest.raises(UserError) as caught:
        load_tokenizer(small_directory)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message and str(small_directory) in message


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        load_tokenizer(tmp_path / "missing")


def test_a_short_tiktoken_file_has_its_specials_after_its_last_rank(small_directory):
    only("qwen.tiktoken", BYTES)(small_directory)
    tokenizer = load_tokenizer(small_directory)
    assert tokenizer.encode("<|endoftext|>a") == [256, ord("a")]


def test_text_that_is_not_text_is_refused(qwen3, qwen1):
    for tokenizer in (qwen3, qwen1):
        with pytest.raises(UserError, match="character 1 is half of a surrogate pair"):
            tokenizer.encode("a\ud800")
        with pytest.raises(UserError, match="must be a string, found int"):
            tokenizer.encode(3)


def test_each_digit_is_its_own_piece(qwen2_files, reference):
    # The vocabulary has no token of two digits, so ids alone would not show it.
    for tokenizer in (qwen2_files.vocabulary.pipeline, reference.backend_tokenizer):
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str("a1234 56")
        assert [piece for piece, _ in pieces] == ["a", "1", "2", "3", "4", "Ġ", "5", "6"]
