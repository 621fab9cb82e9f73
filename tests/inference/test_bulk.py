"""Many prompts at once: which run together, and that each gets its own answer."""

from types import SimpleNamespace

import pytest

from configs.models import get_preset
from qwen_jax.errors import UserError
from qwen_jax.hf_config import with_rope_scaling
from qwen_jax.inference import bulk
from qwen_jax.inference.completion import Completion

CONFIG = get_preset("qwen3-0.6b")
DYNAMIC = with_rope_scaling(CONFIG, {"rope_type": "dynamic", "factor": 2.0})
PROMPTS = [[number] * length for number, length in enumerate([9, 2, 30, 2, 17, 8, 3])]


@pytest.fixture
def asked(monkeypatch):
    """What would run together: (prompts, their numbers). Each is answered with its first token."""
    batches = []

    def stream(model, params, prompts, *arguments, first_row):
        batches.append((prompts, first_row))
        return prompts

    def complete(prompts, rows, *arguments):
        assert rows == len(prompts)
        return [Completion(f"to {prompt[0]}", [prompt[0]], "stop") for prompt in prompts], None

    monkeypatch.setattr(bulk, "TokenStream", stream)
    monkeypatch.setattr(bulk, "complete", complete)
    return batches


def complete_all(prompts, config=CONFIG, **options):
    return bulk.complete_all(SimpleNamespace(config=config), None, None, prompts, 5, **options)


@pytest.mark.parametrize(
    ("config", "batch_size", "expected"),
    [
        (CONFIG, 3, [[1, 3, 6], [5, 0, 4], [2, 2, 2]]),
        (CONFIG, 5, [[1, 3, 6, 5, 0], [4, 2, 2, 2, 2]]),
        (CONFIG, 50, [[1, 3, 6, 5, 0, 4, 2]]),
        (DYNAMIC, 3, [[1], [3], [6], [5], [0], [4], [2]]),
    ],
)
def test_prompts_of_similar_length_run_together_and_are_answered_in_order(
    asked, config, batch_size, expected
):
    found = complete_all(PROMPTS, config, batch_size=batch_size)
    assert [completion.ids for completion in found] == [[number] for number in range(7)]
    # A batch that is not full is filled up, and a prompt's draws are of its place among all.
    assert [numbers for _, numbers in asked] == expected
    assert [prompts for prompts, _ in asked] == [[PROMPTS[i] for i in row] for row in expected]


def test_no_prompts_have_no_answers_and_a_batch_has_a_size(asked):
    assert complete_all([]) == []
    assert asked == []
    with pytest.raises(UserError, match="batch_size = 0"):
        complete_all(PROMPTS, batch_size=0)
