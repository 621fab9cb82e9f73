import dataclasses
import json

import numpy as np
import pytest

from qwen_jax.text import load_tokenizer
from qwen_jax.text.chat import ChatTemplates
from qwen_jax.text.template_engine import Template
from tests.text.chat_templates import CODER, QWEN3, QWEN25
from tests.text.real_vocabulary import byte_characters

ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call> "
    "<tool_response> </tool_response>"
).split()
TEMPLATES = {"qwen2.5": QWEN25, "qwen3": QWEN3, "coder": CODER}


def write_tokenizer(directory, added=ADDED, template=QWEN3, unused=0):
    """Bytes, merges of line ends among them, and the control tokens of chats: it loads at once."""
    line_ends = "\u010a\u010a"
    pieces = [*byte_characters(), "Ġt", "he", "Ġthe", line_ends]
    pieces += [f"{i}x" for i in range(unused)]
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = f"#version: 0.2\nĠ t\nh e\nĠt he\n{line_ends[0]} {line_ends[1]}\n"
    (directory / "merges.txt").write_text(merges, encoding="utf-8")
    config = {
        "added_tokens_decoder": {
            str(len(pieces) + i): {
                "content": token,
                "special": "|" in token,
                "normalized": False,
            }
            for i, token in enumerate(added)
        },
        "eos_token": "<|im_end|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


def with_template(tokenizer, source):
    templates = ChatTemplates({"default": Template(source, "test")})
    return dataclasses.replace(tokenizer, chat_templates=templates)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def random_texts(count, seed=0, longest=60):
    """Texts of which each begins with its own number."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh the \n é"))
    sizes = rng.integers(0, longest, count)
    return [f"{i}:" + "".join(rng.choice(letters, n)) for i, n in enumerate(sizes)]


def random_chats(count, seed=0, longest=30):
    texts = iter(random_texts(4 * count, seed, longest))
    return [
        [
            {"role": role, "content": next(texts)}
            for _ in range(1 + i % 2)
            for role in ("user", "assistant")
        ]
        for i in range(count)
    ]


def text_file(path, count, **options):
    return write_lines(path, [{"text": text} for text in random_texts(count, **options)])


def chat_file(path, count, **options):
    return write_lines(path, [{"messages": chat} for chat in random_chats(count, **options)])
