"""What a checkpoint's routers do with texts of several domains, without training."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.models.decoder import Decoder
from qwen_jax.training.balancing import DOMAIN
from qwen_jax.training.router_figures import of_batch, over_batches, router_figures
from qwen_jax.training.routing_sums import ALL_TOKENS, Grouping, RouterSums, sum_routing

# Tokens of a row whose logits are held at once.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of a model and of texts, of which a token predicts the next.

    Attributes:
      losses: float64 [rows], mean nats a token of each row.
      domains: int [rows], of each row.
      figures: `router_figures`, float64 [L] each, of all texts together; "max_vio_micro" and
        "max_vio_batch" of parts of them.
      by_domain: int64 [L, domains, E], how often each domain chose each expert.
      together: int64 [L, E, E], tokens that chose both.
      choices: int16 [L, tokens, k], of each real token, experts in ascending order; E for none.
    """

    losses: np.ndarray
    domains: np.ndarray
    figures: dict[str, np.ndarray]
    by_domain: np.ndarray
    together: np.ndarray
    choices: np.ndarray

    @property
    def loss(self) -> float:
        """Nats a token, each row as much as another."""
        return float(self.losses.mean())


class Reader:
    """Runs a model on batches of texts; compiled once for all parameters and shapes alike.

    Attributes:
      model: with experts.
      num_domains: of the texts.
      microbatch_rows: rows of a part of a batch whose balance is measured by itself.
    """

    def __init__(self, model: Decoder, num_domains: int, microbatch_rows: int):
        self.model, self.num_domains = model, num_domains
        self.microbatch_rows = microbatch_rows
        self._run = jax.jit(self._read)

    def read(self, params: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> Measured:
        """Measures texts.

        Args:
          params: of the model.
          batches: each with `input_ids` and `domains`, and `attention_mask` where rows are filled
            up, padding last.
        """
        losses, domains, choices, each = [], [], [], []
        together: RouterSums | None = None
        for batch in batches:
            mask = batch.get("attention_mask")
            nats, sums, figures, experts = self._run(
                params, batch["input_ids"], mask, batch["domains"]
            )
            together = sums if together is None else jax.tree.map(jnp.add, together, sums)
            each.append(figures)
            losses.append(np.asarray(nats, np.float64))
            domains.append(np.asarray(batch["domains"]))
            real = np.ones(batch["input_ids"].shape, bool) if mask is None else mask.astype(bool)
            choices.append(np.sort(np.asarray(experts, np.int16)[:, real], axis=-1))
        figures = over_batches(router_figures(together, self.model.config.moe), each)
        return Measured(
            losses=np.concatenate(losses),
            domains=np.concatenate(domains),
            figures={name: np.asarray(value, np.float64) for name, value in figures.items()},
            by_domain=np.asarray(together.groups[DOMAIN].counts, np.int64),
            together=np.asarray(together.each.together, np.int64),
            choices=np.concatenate(choices, axis=1),
        )

    def _read(
        self, params: Any, ids: jax.Array, mask: jax.Array | None, domains: jax.Array
    ) -> tuple[jax.Array, RouterSums, dict[str, jax.Array], jax.Array]:
        rows, model = len(ids), self.model
        out = model.apply({"params": params}, ids, mask, logits_at=jnp.zeros(1, jnp.int32))
        real = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        parts = -(-rows // self.microbatch_rows)
        groupings = {
            **ALL_TOKENS,
            DOMAIN: Grouping(domains, self.num_domains),
            "micro": Grouping(jnp.arange(rows) // self.microbatch_rows, parts),
        }
        routings = [routing for routing in out.router if routing is not None]
        sums = [sum_routing(routing, real, groupings, each=True) for routing in routings]
        sums = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)
        figures = of_batch(router_figures(sums, model.config.moe))
        experts = jnp.stack([routing.experts for routing in routings])
        return self._nats(params, out.hidden_states[-1], ids, real), sums, figures, experts

    def _nats(self, params: Any, x: jax.Array, ids: jax.Array, real: jax.Array) -> jax.Array:
        """float32 [rows], mean nats of the tokens behind the first."""
        x, targets, weights = x[:, :-1], ids[:, 1:], real[:, 1:]
        blocks = -(-x.shape[1] // _BLOCK)
        fill = blocks * _BLOCK - x.shape[1] if blocks > 1 else 0

        def cut(a: jax.Array) -> jax.Array:
            a = jnp.pad(a, [(0, 0), (0, fill)] + [(0, 0)] * (a.ndim - 2))
            return jnp.moveaxis(a.reshape(len(a), blocks, -1, *a.shape[2:]), 1, 0)

        def block(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, targets = part
            logits = self.model.apply({"params": params}, x, method="read")
            right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - right

        nats = jnp.moveaxis(jax.lax.map(block, (cut(x), cut(targets))), 0, 1)
        nats = nats.reshape(len(x), -1)[:, : x.shape[1]]
        return jnp.sum(nats, axis=1, where=weights) / jnp.maximum(weights.sum(axis=1), 1)


def saturation(choices: np.ndarray, last: np.ndarray) -> np.ndarray:
    """[L], what part of each token's experts it has in another state too (arXiv 2409.02060).

    Args:
      choices, last: int [L, tokens, k], ascending in a token, of the same tokens.
    """
    k = choices.shape[-1]
    shared = (choices[..., :, None] == last[..., None, :]).sum(axis=(-2, -1))
    return shared.mean(axis=-1) / k


def in_batches(rows: Mapping[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Arrays [rows, ...] in batches of so many, the last with what is left."""
    count = len(rows["input_ids"])
    for start in range(0, count, size):
        yield {name: array[start : start + size] for name, array in rows.items()}


# What takes a state's parameters to figures of them.
Measure = Callable[[Any], Measured]
