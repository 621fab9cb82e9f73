"""What to plan for every released size: `python -m tools.plan_table` compiles these programs.

Its results are beside this file: README.md has the table, plans.json all figures. One row is for
all models of one shape, of which `model` is the first.
"""

from typing import NamedTuple

from qwen_jax.sharding.flops import Mode


class Row(NamedTuple):
    """A program to plan.

    Attributes:
      model: a preset.
      mode: a train step with optimiser, a prompt's pass, or a step of decoding.
      topology, mesh: as `tools.plan` takes them.
      batch: rows, of all chips together.
      length: tokens of a row; in decode the slots of its cache.
    """

    model: str
    mode: Mode
    topology: str
    mesh: str
    batch: int
    length: int


ROWS = (
    Row("qwen-1_8b", "decode", "v5e:1x1", "data:1", 4, 4096),
    Row("qwen-7b", "decode", "v5e:2x2", "tensor:4", 8, 4096),
    Row("qwen-14b", "decode", "v6e:2x2", "tensor:4", 8, 4096),
    Row("qwen-72b", "decode", "v5p:2x2x1", "tensor:4", 8, 4096),
    Row("qwen1.5-0.5b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen1.5-4b", "decode", "v5e:2x2", "tensor:4", 8, 4096),
    Row("qwen1.5-32b", "decode", "v6e:2x2", "tensor:4", 8, 4096),
    Row("qwen1.5-110b", "decode", "v5p:2x2x1", "tensor:4", 8, 4096),
    Row("qwen1.5-moe-a2.7b", "decode", "v5e:2x2", "expert:4", 8, 4096),
    Row("codeqwen1.5-7b", "decode", "v5e:2x2", "tensor:4", 8, 4096),
    Row("qwen2-0.5b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen2-1.5b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen2-7b", "decode", "v5e:2x2", "tensor:4", 8, 4096),
    Row("qwen2-72b", "decode", "v6e:2x4", "tensor:8", 8, 4096),
    Row("qwen2-57b-a14b", "decode", "v6e:2x4", "expert:8", 8, 4096),
    Row("qwen2.5-3b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen2.5-14b", "decode", "v5e:2x4", "tensor:8", 8, 4096),
    Row("qwen2.5-32b", "decode", "v5e:4x4", "data:2,tensor:8", 16, 4096),
    Row("qwen2.5-7b-instruct-1m", "prefill", "v5p:4x4x4", "context:16,tensor:4", 1, 1 << 20),
    Row("qwen2.5-14b-instruct-1m", "prefill", "v5p:4x4x4", "context:16,tensor:4", 1, 1 << 20),
    Row("qwen3-0.6b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen3-1.7b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen3-4b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen3-8b", "decode", "v5e:2x2", "tensor:4", 8, 4096),
    Row("qwen3-14b", "decode", "v5e:2x4", "tensor:8", 8, 4096),
    Row("qwen3-32b", "train", "v5p:4x4x8", "fsdp:32,tensor:4", 128, 4096),
    Row("qwen3-30b-a3b", "train", "v5p:4x4x4", "fsdp:8,expert:8", 64, 4096),
    Row("qwen3-235b-a22b", "train", "v5p:8x8x4", "fsdp:32,expert:8", 256, 4096),
    Row("qwen3-coder-30b-a3b-instruct", "decode", "v5e:4x4", "data:2,expert:8", 16, 4096),
    Row("qwen3-coder-480b-a35b-instruct", "decode", "v5p:4x4x4", "expert:16,tensor:4", 64, 8192),
    Row("qwen3-next-80b-a3b-instruct", "decode", "v5e:4x4", "expert:16", 16, 8192),
    Row("qwen3.5-0.8b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen3.5-2b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen3.5-4b", "decode", "v5e:1x1", "data:1", 8, 4096),
    Row("qwen3.5-9b", "decode", "v5e:2x2", "tensor:4", 8, 4096),
    Row("qwen3.5-27b", "decode", "v6e:2x2", "tensor:4", 8, 4096),
    Row("qwen3.5-35b-a3b", "decode", "v5e:2x4", "expert:8", 8, 4096),
    Row("qwen3.5-122b-a10b", "decode", "v6e:4x4", "expert:16", 16, 8192),
    Row("qwen3.5-397b-a17b", "decode", "v5p:4x4x2", "expert:32", 32, 8192),
)
