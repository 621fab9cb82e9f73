"""Small random models to draft for and to draft with, prompts, and the rows of a stream."""

import dataclasses

import jax
import numpy as np

import qwen_jax
from qwen_jax.models.decoder import Decoder
from tests.reference import random_reference, save_reference

HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {
    "dense": ("qwen3", {"num_hidden_layers": 2}),
    "sparse": ("qwen3_moe", {"num_hidden_layers": 2}),
    "hybrid": ("qwen3_next", HYBRID),
}
LENGTHS = [7, 1, 19, 4]


def disturbed(params, amount, seed=0):
    """Parameters of a model that guesses some of the tokens right."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [
        x + amount * x.std() * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noise)


def with_head(model, params):
    """The model with an MTP head of random weights."""
    config = dataclasses.replace(model.config, mtp_layers=1)
    head = Decoder(config).init(jax.random.key(1), np.ones((1, 4), np.int32))["params"]["mtp"]
    keys = iter(jax.random.split(jax.random.key(2), 99))
    head = jax.tree.map(
        lambda x: x + jax.random.normal(next(keys), x.shape) / max(x.shape[-1], 9) ** 0.5, head
    )
    return Decoder(config), {**params, "mtp": head}


def load_random(directory, family, **fields):
    reference = random_reference(family, seed=3, **fields)
    return qwen_jax.load_pretrained(save_reference(reference, directory))


def random_prompts(lengths=LENGTHS, seed=0, vocab_size=320):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def rows_of(stream, count):
    rows = [[] for _ in range(count)]
    for step in stream:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows
