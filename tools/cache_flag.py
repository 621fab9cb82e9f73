"""The flag of the command lines that keep a cache."""

from typing import get_args

from absl import flags

from qwen_jax.nn.cache import CacheDtype

CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    None,
    get_args(CacheDtype),
    "Of keys and values in the cache, for less memory; as they are computed if not given.",
)
