"""The embedded model from nothing: data, tokenizer, training."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.embedded.chats import chats
from qwen_jax.embedded.tokenizer import write_tokenizer
from qwen_jax.training.run import RunOptions, run

_TRAINED, _HELD_OUT = "train.jsonl", "held_out.jsonl"
_SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 768,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
}


def write_data(directory: Path, problems: int, held_out: int, seed: int) -> None:
    """Writes `train.jsonl` and `held_out.jsonl`, two records a problem."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, count, is_held_out in (
        (_TRAINED, problems, False),
        (_HELD_OUT, held_out, True),
    ):
        with (directory / name).open("w", encoding="utf-8") as file:
            for record in chats(seed, count, is_held_out):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_base(directory: Path, seed: int) -> None:
    """Writes the tokenizer and config.json."""
    records = itertools.islice(chats(seed, 4000, False), 8000)
    write_tokenizer(directory, (_words(record) for record in records), _SIZES["vocab_size"])
    (directory / "config.json").write_text(json.dumps(_SIZES, indent=1) + "\n")


def _words(record: dict[str, Any]) -> str:
    """What a record says, for the tokenizer to learn from."""
    parts = [json.dumps(tool) for tool in record.get("tools", [])]
    for message in record["messages"]:
        parts += [message.get("reasoning_content", ""), message["content"]]
    return "\n".join(parts)


def build(options: RunOptions, workdir: Path, problems: int, tell: Callable[[str], None]) -> int:
    """Makes data and tokenizer where they are not there yet, and trains.

    Args:
      options: of the run; paths within `workdir` are filled in.
      workdir: of everything.
      problems: to learn from.
      tell: takes lines for people.
    """
    data, base = workdir / "data", workdir / "base"
    if not (base / "config.json").exists():
        tell(f"drawing {problems:,} problems")
        write_data(data, problems, 500, options.seed)
        write_base(base, options.seed)
    source = dataclasses.replace(options.data.sources[0], path=str(data / _TRAINED))
    held_out = dataclasses.replace(options.data.sources[0], path=str(data / _HELD_OUT))
    options = dataclasses.replace(
        options,
        model=str(base),
        data=dataclasses.replace(options.data, sources=(source,)),
        eval_data=dataclasses.replace(options.data, sources=(held_out,), epochs=1),
    )
    return run(options, workdir, tell=tell)
