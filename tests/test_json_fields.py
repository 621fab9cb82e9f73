"""Fields of JSON objects: the words of their refusals."""

import pytest

from qwen_jax.errors import UserError
from qwen_jax.json_fields import Fields


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("number", "a number"),
        ("integer", "an integer"),
        ("object", "an object"),
        ("list of strings", "a list of strings"),
        ("integer or list of integers", "an integer or list of integers"),
    ],
)
def test_kinds_are_named_with_their_article(kind, words):
    with pytest.raises(UserError) as wrong:
        Fields({"size": True}, "config.json").take("size", kind)
    assert str(wrong.value) == f"config.json: size = true should be {words}"
    with pytest.raises(UserError) as missing:
        Fields({}, "config.json").require("size", kind)
    assert str(missing.value) == f"config.json: size is missing and needed, as {words}"
