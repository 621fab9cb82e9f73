import json
import shutil
from pathlib import Path

import pytest

from qwen_jax.text import Tokenizer, load_tokenizer

from .real_vocabulary import write_qwen1_tokenizer, write_qwen3_tokenizer


@pytest.fixture(scope="session")
def qwen3_directory(tmp_path_factory) -> Path:
    """A complete Qwen3 tokenizer directory with the real vocabulary, without a chat template."""
    return write_qwen3_tokenizer(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def vocab_and_merges_directory(qwen3_directory, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("vocab_and_merges")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(qwen3_directory / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def qwen1_directory(tmp_path_factory) -> Path:
    return write_qwen1_tokenizer(tmp_path_factory.mktemp("qwen1"))


@pytest.fixture(scope="session")
def qwen3(qwen3_directory) -> Tokenizer:
    return load_tokenizer(qwen3_directory)


@pytest.fixture(scope="session")
def qwen2_files(vocab_and_merges_directory) -> Tokenizer:
    return load_tokenizer(vocab_and_merges_directory)


@pytest.fixture(scope="session")
def qwen1(qwen1_directory) -> Tokenizer:
    return load_tokenizer(qwen1_directory)


@pytest.fixture(scope="session")
def reference(qwen3_directory):
    """transformers' own tokenizer of the same directory."""
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(qwen3_directory)


@pytest.fixture
def small_directory(tmp_path) -> Path:
    """A checkpoint directory that loads at once: bytes, three merges and a few added tokens."""
    from .real_vocabulary import byte_characters

    pieces = [*byte_characters(), "Ġt", "he", "Ġthe"]
    (tmp_path / "vocab.json").write_text(
        json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8"
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n", encoding="utf-8")
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    config = {
        "added_tokens_decoder": {
            str(259 + i): {"content": token, "special": "|" in token, "normalized": False}
            for i, token in enumerate(added)
        },
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path
