import json
from pathlib import Path

import pytest

import qwen_jax
from tests.reference import random_reference, save_reference
from tests.text.real_vocabulary import byte_characters


@pytest.fixture(scope="session")
def reference():
    """Qwen3 with tied embeddings, every tensor random."""
    return random_reference("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def saved(reference, tmp_path_factory) -> Path:
    """What transformers writes of it. Not to be written to."""
    return save_reference(reference, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="session")
def companions() -> dict[str, bytes]:
    """Files that lie beside the weights, by name; the tokenizer among them loads."""
    vocabulary = {piece: i for i, piece in enumerate([*byte_characters(), "he"])}
    return {
        "vocab.json": json.dumps(vocabulary).encode(),
        "merges.txt": b"#version: 0.2\nh e\n",
        "tokenizer_config.json": b"{}",
        "generation_config.json": b'{"temperature": 0.7}',
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE": b"Apache",
        "README.md": b"# Card",
    }


@pytest.fixture
def refused():
    """Checks that a call ends in a UserError of one plain line that says all of `parts`."""

    def check(call, *parts: str) -> str:
        with pytest.raises(qwen_jax.UserError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        assert message.isprintable()
        for part in parts:
            assert part in message
        return message

    return check
