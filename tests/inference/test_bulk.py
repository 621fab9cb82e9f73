"""Many prompts at once: which run together, and that each gets its own answer."""

from types import SimpleNamespace

import pytest

from configs.models import get_preset
from qwen_jax.errors import UserError
from qwen_jax.inference import bulk
from qwen_jax.inference.completion import Completion
from qwen_jax.rope_scaling import with_rope_scaling

CONFIG = get_preset("qwen3-0.6b")
DYNAMIC = with_rope_scaling(CONFIG, {"rope_type": "dynamic", "factor": 2.0})
PROMPTS = [[number] * length for number, length in enumerate([9, 2, 30, 2, 17, 8, 3])]


@pytest.fixture
def asked(monkeypatch):
    """What would run together: (prompts, their numbers). Each is answered with its first token."""
    batches = []

    def batch(model, params, prompts, *arguments, first_row, cache_dtype):
        assert cache_dtype is None
        batches.append((prompts, first_row))
        return prompts

    def slots(model, params, prompts, most, options, stop_ids, seed, rows, size, cache_dtype):
        assert cache_dtype is None
        batches.append((prompts, list(rows), size))
        return prompts

    def finished_texts(prompts, rows, *arguments, thinking_budget):
        assert rows == len(prompts)
        # The last first: texts end in any order.
        for row, prompt in reversed(list(enumerate(prompts))):
            yield row, Completion(f"to {prompt[0]}", [prompt[0]], "stop")

    monkeypatch.setattr(bulk, "TokenStream", batch)
    monkeypatch.setattr(bulk, "SlotStream", slots)
    monkeypatch.setattr(bulk, "finished_texts", finished_texts)
    return batches


def complete_all(prompts, config=CONFIG, mesh=None, **options):
    model = SimpleNamespace(config=config, mesh=mesh)
    return bulk.complete_all(model, None, None, prompts, 5, **options)


def test_rows_take_one_prompt_after_another(asked):
    found = complete_all(PROMPTS, batch_size=3, rows=range(10, 17))
    assert [completion.ids for completion in found] == [[number] for number in range(7)]
    assert asked == [(PROMPTS, list(range(10, 17)), 3)]


@pytest.mark.parametrize(
    ("config", "mesh", "batch_size", "expected"),
    [
        (CONFIG, "tensor:2", 3, [[1, 3, 6], [5, 0, 4], [2, 2, 2]]),
        (CONFIG, "tensor:2", 5, [[1, 3, 6, 5, 0], [4, 2, 2, 2, 2]]),
        (CONFIG, "tensor:2", 50, [[1, 3, 6, 5, 0, 4, 2]]),
        (DYNAMIC, None, 3, [[1], [3], [6], [5], [0], [4], [2]]),
    ],
)
def test_else_prompts_of_similar_length_run_together_and_are_answered_in_order(
    asked, config, mesh, batch_size, expected
):
    found = complete_all(PROMPTS, config, mesh, batch_size=batch_size)
    assert [completion.ids for completion in found] == [[number] for number in range(7)]
    # A batch that is not full is filled up, and a prompt's draws are of its place among all.
    assert [numbers for _, numbers in asked] == expected
    assert [prompts for prompts, _ in asked] == [[PROMPTS[i] for i in row] for row in expected]


def test_no_prompts_have_no_answers_and_a_batch_has_a_size(asked):
    assert complete_all([]) == []
    assert complete_all([], mesh="tensor:2") == []
    assert asked == [([], [], 8)]
    with pytest.raises(UserError, match="batch_size = 0"):
        complete_all(PROMPTS, batch_size=0)
