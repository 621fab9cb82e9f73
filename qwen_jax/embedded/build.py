"""The embedded model from nothing: data, tokenizer, training."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.writer import write_json
from qwen_jax.embedded.chats import chats
from qwen_jax.embedded.tokenizer import write_tokenizer
from qwen_jax.pretrained import load_tokenizer
from qwen_jax.training.data import DataOptions, SourceOptions, TokenOptions
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.run import MODEL, RunOptions, run
from qwen_jax.training.step_options import TrainOptions

_TRAINED, _HELD_OUT = "train.jsonl", "held_out.jsonl"
_MOST_HELD_OUT = 500
_SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 768,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
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


def write_base(directory: Path, seed: int, **sizes: Any) -> None:
    """Writes the tokenizer and config.json, with other sizes where they are given."""
    records = itertools.islice(chats(seed, 4000, False), 8000)
    write_tokenizer(directory, (_words(record) for record in records), _SIZES["vocab_size"])
    tokenizer = load_tokenizer(directory)
    ids = {
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    write_json(directory / "generation_config.json", {"do_sample": False, **ids})
    write_json(directory / "config.json", {**_SIZES, **ids, **sizes})


def _words(record: dict[str, Any]) -> str:
    """What a record says, for the tokenizer to learn from."""
    parts = [json.dumps(tool) for tool in record.get("tools", [])]
    for message in record["messages"]:
        parts += [message.get("reasoning_content", ""), message["content"]]
    return "\n".join(parts)


def run_options(num_steps: int, seed: int = 0) -> RunOptions:
    """The settings of the training; `build` fills in the paths."""
    source = SourceOptions(_TRAINED, too_long="truncate")
    data = DataOptions(
        sources=(source,),
        length=256,
        batch_size=16,
        seed=seed,
        tokens=TokenOptions(last_turn_only=True),
    )
    return RunOptions(
        model="base",
        from_scratch=True,
        data=data,
        eval_data=dataclasses.replace(data, epochs=1),
        optimiser=OptimiserOptions(
            name="muon",
            learning_rate=4e-3,
            schedule="wsd",
            warmup_steps=num_steps // 12,
            decay_steps=max(1, num_steps // 4),
            weight_decay=0.05,
            b2=0.98,
        ),
        step=TrainOptions(dtype="float32", scan=False, remat="none", block_size=4096),
        loop=LoopOptions(
            num_steps=num_steps,
            checkpoint_every=max(1, num_steps // 4),
            eval_every=max(1, num_steps // 4),
        ),
        seed=seed,
    )


def build(workdir: Path, problems: int, num_steps: int, seed: int = 0) -> int:
    """Makes data and tokenizer where they are not there yet, and trains; `training.run.run` else.

    Args:
      workdir: of everything; `published/` is what comes of it, `model/` the same in float32.
      problems: to learn from.
      num_steps: updates.
      seed: of problems, order and parameters.

    Returns:
      The steps that were made.
    """
    data, base = workdir / "data", workdir / "base"
    if not (base / "config.json").exists():
        write_data(data, problems, min(problems // 10, _MOST_HELD_OUT), seed)
        write_base(base, seed)
    options = run_options(num_steps, seed)

    def at(part: DataOptions, name: str) -> DataOptions:
        source = dataclasses.replace(part.sources[0], path=str(data / name))
        return dataclasses.replace(part, sources=(source,))

    options = dataclasses.replace(
        options,
        model=str(base),
        data=at(options.data, _TRAINED),
        eval_data=at(options.eval_data, _HELD_OUT),
    )
    done = run(options, workdir, more={"problems": problems})
    published = workdir / "published"
    if done == num_steps:
        shutil.rmtree(published, ignore_errors=True)
        convert(workdir / MODEL, published, "hf", dtype="bfloat16")
    return done
