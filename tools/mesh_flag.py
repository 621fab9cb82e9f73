"""The flag of the command lines that spread a model over devices."""

from absl import flags

from qwen_jax.sharding.axes import MESH_AXES

MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Devices to spread the model over, such as fsdp:4,tensor:2; axes are "
    f"{', '.join(MESH_AXES)}. Without it, one device.",
)
