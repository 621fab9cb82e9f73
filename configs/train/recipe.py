"""What recipes have in common: their settings as a ConfigDict, and their small variants."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from qwen_jax.errors import UserError
from qwen_jax.training.data import DataOptions, SourceOptions, TokenOptions
from qwen_jax.training.run_options import ConfigChanges
from qwen_jax.training.step_options import TrainOptions

SMALL = "small"
# Where `tools.build_samples` writes, and each small recipe's model is expected.
_ROOT = "runs/small"
_LEARNED = {name: TokenOptions(last_turn_only=True) for name in ("chats", "short_chats")}
# On CPU there is nothing to win by scanning, recomputing, or fewer bits.
SMALL_STEP = TrainOptions(dtype="float32", scan=False, remat="none", block_size=2048)


def recipe(**fields: Any) -> ConfigDict:
    """Settings of a run; parts are dataclasses. What users mostly add is there as its default."""
    fields = {
        "mesh": None,
        "seed": 0,
        "lora": None,
        "changes": ConfigChanges(),
        "eval_data": None,
        **fields,
    }
    return ConfigDict(
        {
            name: dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part
            for name, part in fields.items()
        }
    )


def split(argument: str, stages: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What stands behind the colon of FILE.py:ARGUMENT, by commas, and whether it says "small".

    Args:
      argument: such as "long,small".
      stages: of which the first word must be one.

    Raises:
      UserError: it is none.
    """
    words = [word for word in argument.split(",") if word]
    rest = [word for word in words if word != SMALL]
    if stages and (len(rest) != 1 or rest[0] not in stages):
        raise UserError(f"{argument!r}: give one of {', '.join(stages)}, such as {stages[0]}")
    return rest, len(rest) < len(words)


def small_model(name: str) -> str:
    """The model that a small recipe left in its workdir, `runs/small/NAME`."""
    return f"{_ROOT}/{name}/model"


def small_base(name: str = "base") -> str:
    """Sizes and tokenizer of a small model without weights."""
    return f"{_ROOT}/{name}"


def small_data(
    names: dict[str, float | None], *, length: int, batch_size: int, **fields: Any
) -> dict[str, DataOptions]:
    """The parts `data`, with each name's weight, and `eval_data`, of the first name.

    Data are those of `tools.build_samples`; of chats the last turn is learned, as they are made.
    """
    first = next(iter(names))
    options = {
        "length": length,
        "batch_size": batch_size,
        "tokens": _LEARNED.get(first, TokenOptions()),
        **fields,
    }

    def sources(ending: str, weights: dict[str, float | None]) -> tuple[SourceOptions, ...]:
        # Of texts no token is lost; chats and pairs that are too long are told of.
        return tuple(
            SourceOptions(f"{_ROOT}/data/{name}{ending}.jsonl", weight)
            for name, weight in weights.items()
        )

    return {
        "data": DataOptions(sources("", names), **options),
        "eval_data": DataOptions(sources("_held_out", {first: None}), epochs=1, **options),
    }
