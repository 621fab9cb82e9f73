"""What is to run on which chips, and the program that does it, laid out and not yet compiled."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.inference.checks import check_writes_text
from qwen_jax.inference.decoding import DecodeState, decode_step, prefill
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.nn.cache import CacheDtype, cache_shardings, check_cache_dtype, init_cache
from qwen_jax.nn.dual_chunk import BRANCHES
from qwen_jax.nn.expert_exchange import pays_to_exchange
from qwen_jax.nn.moe import choose_dispatch
from qwen_jax.sharding import aot
from qwen_jax.sharding.axes import (
    MESH_AXES,
    TOKENS,
    Layout,
    check_mesh,
    num_shards,
    parameter_shardings,
)
from qwen_jax.sharding.chips import Topology
from qwen_jax.sharding.flops import Mode
from qwen_jax.training.objective import Batch, TrainOptions
from qwen_jax.training.train_step import abstract_train_state, make_train_step

# Queries and keys of a block of attention, as `nn.attend` cuts long texts.
_ATTENTION_BLOCK = 512
# What activations and the parameters of inference are in.
_DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to run, and where.

    Attributes:
      config: of the model.
      topology: of the chips.
      mesh: size of each of `MESH_AXES`.
      mode: a train step, a prompt's pass, or a decode step.
      batch: rows, of all chips together.
      length: tokens of a row; in decode the slots of its cache.
      options: of a train step.
      cache_dtype: as for `init_cache`; None for that of activations, and in training.
    """

    config: ModelConfig
    topology: Topology
    mesh: tuple[tuple[str, int], ...]
    mode: Mode
    batch: int
    length: int
    options: TrainOptions = TrainOptions()  # noqa: RUF009, it is frozen
    cache_dtype: CacheDtype | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh as `sharding.axes.read_mesh` gives it."""
        return dict(self.mesh)


def check(job: Job) -> None:
    """Checks what can be checked before anything runs.

    Raises:
      UserError: as `estimate`.
    """
    for name in ("batch", "length"):
        if getattr(job, name) < 1:
            raise UserError(f"{name} = {getattr(job, name)} must be at least 1")
    check_cache_dtype(job.cache_dtype)
    if job.mode == "train" and job.cache_dtype is not None:
        raise UserError(
            f"cache_dtype = {job.cache_dtype}: training has no cache; give mode decode or prefill"
        )
    aot.check_devices(job.topology, job.sizes)
    check_writes_text(job.config)
    check_mesh(job.config, mesh_of_no_devices(job), parameter_shapes(job.config))


def mesh_of_no_devices(job: Job) -> AbstractMesh:
    """The mesh of a job, to lay arrays out and to trace with where libtpu is not needed."""
    shape = tuple(job.sizes[axis] for axis in MESH_AXES)
    return AbstractMesh(
        shape,
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        abstract_device=AbstractDevice("TPU", num_cores=None, platform="tpu"),
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A function under `jit`, what it is called with, and the named parts of that."""

    function: Any
    arguments: tuple[Any, ...]
    parts: dict[str, Any]


def build_program(job: Job, mesh: Mesh | AbstractMesh) -> Program:
    """The program that would run, with abstract arguments laid out on `mesh`."""
    config = job.config
    model = Decoder(config, dispatch=_dispatch(job, mesh), mesh=mesh)
    if job.mode == "train":
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.1))
        state = abstract_train_state(model, optimiser, stacked=job.options.scan)
        ids = _abstract((job.batch, job.length), jnp.int32, mesh, *_fitting(job, mesh))
        step = make_train_step(model, optimiser, job.options, state)
        parts = {"parameters": state.params, "optimiser": state.opt_state}
        return Program(step, (state, Batch(ids)), parts)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, _DTYPE, sharding=sharding),
        parameter_shapes(config),
        parameter_shardings(config, mesh, parameter_shapes(config)),
    )
    cache = jax.eval_shape(
        lambda: init_cache(config, job.batch, job.length, _DTYPE, mesh, job.cache_dtype)
    )
    cache = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        cache,
        cache_shardings(config, mesh, cache),
    )
    parts = {"parameters": params, "cache": cache}
    row = functools.partial(_abstract, (job.batch,), mesh=mesh)
    rule = jax.tree.map(lambda x: _abstract((), x.dtype, mesh), SamplingOptions().rule())
    if job.mode == "decode":
        key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), job.batch)).dtype
        state = DecodeState(
            cache, row(dtype=jnp.int32), row(dtype=key), _abstract((), jnp.int32, mesh), None
        )
        step = decode_step("tpu")
        return Program(step, (model, params, state, row(dtype=jnp.int32), rule), parts)
    text = functools.partial(_abstract, (job.batch, job.length), mesh=mesh)
    ids, mask, positions = text(dtype=jnp.int32), text(dtype=bool), text(dtype=jnp.int32)
    seed, rows = _abstract((), jnp.uint32, mesh), row(dtype=jnp.int32)
    forced = row(dtype=jnp.int32)
    arguments = (model, params, cache, ids, mask, positions, seed, rows, forced, rule)
    return Program(prefill, arguments, parts)


def _abstract(
    shape: tuple[int, ...], dtype: Any, mesh: Mesh | AbstractMesh, *logical: str | None
) -> jax.ShapeDtypeStruct:
    """An array on all devices, or laid out by its logical axes."""
    sharding = Layout(mesh).sharding(*logical)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _fitting(job: Job, mesh: Mesh | AbstractMesh) -> tuple[str | None, ...]:
    """Axes of a batch that divide; the others are padded by the program."""
    shape = (job.batch, job.length)
    return tuple(
        name if size % num_shards(mesh, name) == 0 else None
        for name, size in zip(TOKENS, shape, strict=True)
    )


def _dispatch(job: Job, mesh: Mesh | AbstractMesh) -> Any:
    if job.config.moe is None:
        return None
    return choose_dispatch(_tokens_of_a_group(job, mesh), job.config.moe, "tpu")


def _tokens_of_a_group(job: Job, mesh: Mesh | AbstractMesh) -> int:
    """Tokens that meet each other at one set of experts."""
    tokens = job.batch * (1 if job.mode == "decode" else job.length)
    return -(-tokens // Layout.of(job.config, mesh).num_expert_groups)


def mean_turns(job: Job, mesh: Mesh | AbstractMesh) -> float:
    """Mean turns of the loops that depend on data: a decode step's experts, blocks of keys."""
    if job.mode == "decode":
        if job.config.moe is None:
            return 1
        moe = job.config.moe
        # One for each choice, or a block of choices for each expert.
        chosen = _tokens_of_a_group(job, mesh) * moe.num_experts_per_tok
        return min(chosen, moe.num_experts) / num_shards(mesh, "experts")
    # In a ring, a loop over each shard's keys.
    blocks = -(-job.length // _ATTENTION_BLOCK)
    return share_seen(job) * blocks / num_shards(mesh, "length")


def share_filled(job: Job, mesh: Mesh | AbstractMesh) -> float:
    """The share of rows at a device's experts that are tokens, if all experts have as many."""
    shards = num_shards(mesh, "experts")
    if job.config.moe is None or shards == 1:
        return 1
    k, own = job.config.moe.num_experts_per_tok, job.config.moe.num_experts // shards
    # Where tokens are exchanged there is room for all that could come, else for all choices.
    return k / (shards * min(k, own)) if pays_to_exchange(shards, k) else 1 / shards


def share_seen(job: Job) -> float:
    """The share of blocks of queries and keys that attention computes: up to the diagonal."""
    if job.mode == "decode":
        return 1
    blocks = -(-job.length // _ATTENTION_BLOCK)
    # Branches share them out.
    branches = 1 if job.config.far is None else 2
    if job.config.dual_chunk is not None:
        branches = len(BRANCHES)
    return (blocks + 1) / (2 * blocks) / branches
