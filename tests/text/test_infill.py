"""Fill-in-the-middle prompts against the published layout; files that hold its tokens."""

import pytest

from qwen_jax.errors import UserError
from qwen_jax.text import load_tokenizer
from qwen_jax.text.infill import file_infill, infill_stop_ids, repository_infill

from .test_sentencepiece import SYMBOLS, train, write_config

BEFORE, AFTER = "def f(x):\n    return ", "\n\n\nprint(f(3))\n"
FILES = [("a.py", "import b\n"), ("lib/é.py", "x = '词'")]
CODER = (
    "<|repo_name|>house\n<|file_sep|>a.py\nimport b\n\n<|file_sep|>lib/é.py\nx = '词'\n"
    "<|file_sep|>main.py\n"
)
HOLE = f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>"


@pytest.fixture(scope="module")
def codeqwen(tmp_path_factory):
    return load_tokenizer(write_config(train(tmp_path_factory.mktemp("codeqwen"))))


def first_spelling(text):
    names = {"<|repo_name|>": "<reponame>"}
    for name in ("fim_prefix", "fim_suffix", "fim_middle", "file_sep"):
        names[f"<|{name}|>"] = f"<{name}>"
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def test_a_file_with_a_hole_has_the_ids_of_the_published_text(qwen3, reference, codeqwen):
    ids = file_infill(qwen3, BEFORE, AFTER)
    assert ids == reference(HOLE, add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (151659, 151660)
    assert file_infill(codeqwen, BEFORE, AFTER) == codeqwen.encode(first_spelling(HOLE))
    assert qwen3.decode(file_infill(qwen3, "", "")) == "<|fim_prefix|><|fim_suffix|><|fim_middle|>"


def test_a_repository_has_the_ids_of_the_published_text(qwen3, reference, codeqwen):
    ids = repository_infill(qwen3, "house", FILES, "main.py", BEFORE, AFTER)
    assert ids == reference(CODER + HOLE, add_special_tokens=False)["input_ids"]
    ids = repository_infill(codeqwen, "house", FILES, "main.py", BEFORE, AFTER)
    assert ids == codeqwen.encode(first_spelling(CODER + HOLE))


@pytest.mark.parametrize("token", ["<|fim_middle|>", "<|endoftext|>", "<file_sep>", "<s>"])
def test_files_cannot_forge_control_tokens(qwen3, codeqwen, token):
    for tokenizer in (qwen3, codeqwen):
        control = set(tokenizer.added_tokens.values())
        plain = repository_infill(tokenizer, "n", [("p", "c")], "q", "a", "b")
        ids = repository_infill(tokenizer, token, [(token, token)], token, token, token)
        assert [i for i in ids if i in control] == [i for i in plain if i in control]
        assert tokenizer.decode(ids).count(token) >= 6


def test_an_infill_ends_at_every_token_of_its_prompts(qwen3, codeqwen):
    assert set(infill_stop_ids(qwen3)) == {151643, 151645, *range(151659, 151665)}
    names = {codeqwen.decode(i) for i in infill_stop_ids(codeqwen)}
    assert names == {"<|endoftext|>", "<|im_end|>", *SYMBOLS}


def test_what_cannot_be_filled_in_is_refused(qwen1, small_directory, qwen3, tmp_path):
    for tokenizer in (qwen1, load_tokenizer(small_directory)):
        for refused in (
            lambda: file_infill(tokenizer, "a", "b"),  # noqa: B023
            lambda: repository_infill(tokenizer, "n", [], "p", "a", "b"),  # noqa: B023
            lambda: infill_stop_ids(tokenizer),  # noqa: B023
        ):
            with pytest.raises(
                UserError, match=r"infill: the tokenizer has no tokens such as <\|f"
            ):
                refused()
    no_files = train(tmp_path, user_defined_symbols=SYMBOLS[:3])
    with pytest.raises(UserError, match=r"no tokens such as <.fim_prefix.>, .*<.repo_name.>"):
        repository_infill(load_tokenizer(no_files), "n", [], "p", "a", "b")
    for arguments, reason in (
        (("a\nb", [], "p", "", ""), "repository should be one line of text, is 'a\\nb'"),
        (("", [], "p", "", ""), "repository should be one line"),
        (("n", [("a\nb", "")], "p", "", ""), "path should be one line"),
        (("n", [("a", 3)], "p", "", ""), "content should be a string, is '3'"),
        (("n", [], 3, "", ""), "path should be a string"),
        (("n", [], "p", None, ""), "prefix should be a string, is 'None'"),
        (("n", [], "p", "", []), "suffix should be a string"),
    ):
        with pytest.raises(UserError) as caught:
            repository_infill(qwen3, *arguments)
        assert str(caught.value).startswith(f"infill: {reason}")
