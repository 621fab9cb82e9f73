"""Packed rows give the losses and gradients of a row a text, for dense and hybrid models."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.data.options import DataOptions, SourceOptions, TokenOptions
from qwen_jax.training.data.pipeline import make_loader
from qwen_jax.training.objective import Batch, TrainOptions, metrics_of, objective
from tests.sharding.models import CONFIGS, one_device
from tests.training.data.conftest import chat_file, text_file

EXACT = TrainOptions(
    dtype="float32",
    scan=False,
    remat="none",
    balance=BalanceOptions(pooling="model"),
    z_loss=0.1,
)


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def learn(request, tokenizer):
    config = dataclasses.replace(CONFIGS[request.param], vocab_size=tokenizer.vocab_size)
    model, params = one_device(config)

    @jax.jit
    def run(batch):
        grad = jax.value_and_grad(lambda p: objective(model, p, batch, EXACT), has_aux=True)
        (loss, sums), gradients = grad(params)
        return (loss, metrics_of(model, sums, EXACT)), gradients

    return run


def whole_epoch(tokenizer, path, rows, pack, length):
    """All records as one batch, the last rows of which are padding alone."""
    options = DataOptions(
        (SourceOptions(path, too_long="truncate"),),
        length=length,
        batch_size=rows,
        pack=pack,
        epochs=1,
        threads=0,
        tokens=TokenOptions(),
    )
    loader = make_loader(options, tokenizer)
    (batch,) = loader
    assert not batch["attention_mask"][-1].any()
    return Batch(**batch), loader.counts


@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_packed_and_unpacked_rows_are_learned_alike(learn, tokenizer, tmp_path, kind, request):
    """With -s it prints a row of a table: padding, loss and gradients of both."""
    write = {"texts": text_file, "chats": chat_file}[kind]
    path = write(tmp_path / "a.jsonl", 9, longest=20 if kind == "texts" else 4)
    packed, counts = whole_epoch(tokenizer, path, 8, True, 96)
    single, single_counts = whole_epoch(tokenizer, path, 11, False, 96)
    assert counts.padding_share < single_counts.padding_share
    assert packed.segment_ids.max() > 1
    assert single.segment_ids.max() == 1
    assert counts.learned == single_counts.learned > 0

    (loss, metrics), gradients = learn(packed)
    (expected, expected_metrics), wanted = learn(single)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    differences = jax.tree.map(lambda a, b: abs(a - b).max() / abs(b).max(), gradients, wanted)
    print(
        f"\n| {kind}, {request.node.callspec.params['learn']} "
        f"| {single_counts.padding_share:.0%} | {counts.padding_share:.0%} "
        f"| {expected:.7f} | {loss:.7f} | {max(jax.tree.leaves(differences)):.1e} |"
    )
    assert metrics["tokens"] == expected_metrics["tokens"] == counts.learned
    for (name, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
    ):
        assert np.isfinite(ours).all()
        atol = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=str(name))


def test_no_text_reads_another_of_its_row(learn, tokenizer, tmp_path):
    """Other words in the first text of a row leave the losses of the second as they are."""
    path = text_file(tmp_path / "a.jsonl", 9, longest=20)
    batch, _ = whole_epoch(tokenizer, path, 8, True, 64)
    second = (batch.segment_ids == 2) & batch.attention_mask
    assert second.any()
    batch = batch.replace(loss_weights=batch.loss_weights * second)
    rng = np.random.default_rng(0)
    letters = tokenizer.encode("abcdefgh")
    others = np.where(
        batch.segment_ids == 1, rng.choice(letters, batch.input_ids.shape), batch.input_ids
    ).astype(np.int32)
    assert (others != batch.input_ids).any()
    own, changed = (learn(b)[0][1]["loss"] for b in (batch, batch.replace(input_ids=others)))
    assert own > 0
    np.testing.assert_allclose(changed, own, rtol=1e-6)
    assert re.match("float", str(own.dtype))
