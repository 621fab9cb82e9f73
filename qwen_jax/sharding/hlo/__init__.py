"""What a compiled program does, read from its optimised HLO text.

Everything is per device, and what a loop repeats counts as often as the loop runs. Written for what
XLA prints for TPUs, where collectives hide in fusions, in pieces beside other work; CPUs' plainer
programs read the same way.
"""

from qwen_jax.sharding.hlo.buffers import Reads, argument_reads
from qwen_jax.sharding.hlo.collectives import Collective, collectives
from qwen_jax.sharding.hlo.flops import repeated_flops
from qwen_jax.sharding.hlo.text import Module, read_module, shape_bytes

__all__ = [
    "Collective",
    "Module",
    "Reads",
    "argument_reads",
    "collectives",
    "read_module",
    "repeated_flops",
    "shape_bytes",
]
