"""The real Qwen vocabulary in each format that checkpoints ship, made from the dashscope wheel.

The wheel carries the 151,643 ranks of Qwen1, which are also the pieces of Qwen1.5 to Qwen3. The
merges are derived from the ranks: a token's merge is the pair that byte-pair encoding of its bytes
ends with when only lower ranks may merge.
"""

import base64
import json
import shutil
from pathlib import Path

import dashscope

# Ids 151643 to 151668 as Qwen3 publishes them; those from <tool_call> on are not special.
QWEN3_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN3_NOT_SPECIAL = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
FIRST_ADDED_ID = 151643


def tiktoken_path() -> Path:
    """The qwen.tiktoken of the installed dashscope wheel."""
    return Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"


def read_ranks() -> dict[bytes, int]:
    lines = tiktoken_path().read_bytes().split(b"\n")
    pairs = (line.split(b" ") for line in lines if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def byte_characters() -> list[str]:
    """GPT-2's character for each byte, written here again so that tests don't trust ours."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding leaves of `token` with merges of lower rank only."""
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, where = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], limit)
            if rank < best:
                best, where = rank, i
        if where < 0:
            raise ValueError(f"{token!r} is not reachable by merges")
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return parts[0], parts[1]


def vocab_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    characters = byte_characters()

    def spell(data: bytes) -> str:
        return "".join(characters[byte] for byte in data)

    ordered = sorted(ranks, key=ranks.get)
    vocab = {spell(token): ranks[token] for token in ordered}
    merges = []
    for token in ordered:
        if len(token) > 1:
            left, right = last_merge(token, ranks)
            merges.append((spell(left), spell(right)))
    return vocab, merges


def added_tokens_decoder() -> dict[str, dict]:
    return {
        str(FIRST_ADDED_ID + index): {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": content in QWEN3_SPECIAL,
        }
        for index, content in enumerate(QWEN3_SPECIAL + QWEN3_NOT_SPECIAL)
    }


def qwen3_tokenizer_config() -> dict:
    """The fields of Qwen3's tokenizer_config.json, without a chat template."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added_tokens_decoder(),
        "additional_special_tokens": list(QWEN3_SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_vocab_and_merges(directory: str | Path) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json, as the slow tokenizer of Qwen reads."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocab_and_merges(read_ranks())
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(qwen3_tokenizer_config()))
    return directory


def write_qwen3_tokenizer(directory: str | Path) -> Path:
    """All files of a Qwen3 tokenizer but the chat template; tokenizer.json is transformers' own."""
    from transformers import Qwen2Tokenizer

    directory = write_vocab_and_merges(directory)
    written = directory / "by_transformers"
    Qwen2Tokenizer.from_pretrained(directory).save_pretrained(written)
    shutil.move(written / "tokenizer.json", directory / "tokenizer.json")
    shutil.rmtree(written)
    return directory


def write_qwen1_tokenizer(directory: str | Path) -> Path:
    """A directory with qwen.tiktoken alone, as the Qwen1 checkpoints have it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tiktoken_path(), directory / "qwen.tiktoken")
    return directory
