"""Teacher-forced scores against greedy decoding, and that all scalings read the same texts."""

import math

import numpy as np
import pytest

import qwen_jax
from experiments.long_context.measuring import scaled_models
from experiments.long_context.scoring import Draw, draws, make_example, score
from experiments.long_context.tasks import TASKS, Example
from experiments.long_context.text import TextRenderer
from qwen_jax.inference import likelihood
from qwen_jax.inference.generation import generate
from tests.experiments.test_text import ESSAY, Bytes
from tests.reference import random_reference, save_reference


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    reference = random_reference("qwen3", num_hidden_layers=2)
    return qwen_jax.load_pretrained(save_reference(reference, tmp_path_factory.mktemp("model")))


def scored(loaded, ids, answers):
    draw = Draw("passkey", 40, 0.5, 0, 0)
    (found,) = score(*loaded, "none", [(draw, Example(ids, answers))], 1)
    return found


def test_right_is_what_greedy_decoding_writes(loaded):
    prompt = [5, 17, 80, 3, 44, 9, 60, 2]
    (greedy,) = generate(*loaded, [prompt], max_new_tokens=6, stop_ids=())
    found = scored(loaded, prompt + greedy, ((8, 11), (11, 14)))
    assert (found.right, found.share, found.tokens) == (True, 1.0, 14)
    assert 0 < found.nats < math.log(loaded[0].config.vocab_size)
    for place, share in ((9, 0.5), (12, 0.5)):
        changed = prompt + greedy
        changed[place] = (changed[place] + 1) % 90
        other = scored(loaded, changed, ((8, 11), (11, 14)))
        assert not other.right
        # What follows a wrong token is another text, and may be anything.
        assert other.share <= share
        assert other.nats > found.nats
        assert other.digest != found.digest


def test_draws_are_the_same_for_every_scaling_and_differ_among_themselves():
    wanted = draws("passkey", 2000, (0.0, 0.5, 1.0), seeds=(0, 1), count=3)
    assert len(wanted) == len(set(wanted)) == 18
    assert [draw.depth for draw in wanted[:6]] == [0.0] * 3 + [0.5] * 3
    assert {draw.depth for draw in draws("vt", 2000, (0.0, 1.0), (0,), 2)} == {None}
    renderer, task = TextRenderer(Bytes(), ESSAY), TASKS["passkey"]
    texts = {tuple(make_example(renderer, task, draw).ids) for draw in wanted}
    assert len(texts) == 18
    again = make_example(renderer, task, wanted[7])
    assert tuple(again.ids) in texts


@pytest.mark.parametrize(
    "rope",
    (
        "none",
        "dca,original=512",
        "rerope,window=256",
        "self_extend:8,window=256",
        "sinks,window=256",
        "stepped_ntk,original=1024,logn=true,window=256",
    ),
)
def test_memory_is_linear_in_the_length(loaded, rope):
    """Of a whole pass with its scores; those of 8,192 tokens at once would be 1 GB alone."""
    model, params = loaded
    (scaled,) = scaled_models(model, [rope]).values()

    def temporaries(length):
        ids, mask = np.zeros((1, length), np.int32), np.ones((1, length), bool)
        lowered = likelihood._forward.lower(scaled, params, ids, mask, ids, ids, mask)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < min(2.2 * temporaries(4096), 100e6)
