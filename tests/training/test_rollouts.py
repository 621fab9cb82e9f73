"""Answers written for GRPO against `generate`, and where they stand in what is learned."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

import qwen_jax
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.training.data.prompts import PromptRecords
from qwen_jax.training.grpo import GrpoOptions, grpo
from qwen_jax.training.log_probs import score
from qwen_jax.training.rollouts import Rollout, read_prompts, roll_out, to_learn, write_answers
from tests.training.prompts import EXACT, OPTIONS, prompt_file, run_options


@pytest.mark.parametrize("mesh", [None, "fsdp:2,tensor:2"])
def test_greedy_rollouts_are_those_of_generate_on_any_mesh(pair, mesh):
    _, model, params, directory = pair
    prompts = [[5, 6, 7], list(range(9, 30)), [40] * 11]
    expected = qwen_jax.generate(model, params, prompts, max_new_tokens=6, stop_ids=(3,))
    if mesh is not None:
        model, params = qwen_jax.load_pretrained(directory, mesh=mesh)
    for write_batch in (None, 2) if mesh is None else (None,):
        ours = write_answers(
            model,
            params,
            prompts,
            SamplingOptions(),
            max_new_tokens=6,
            stop_ids=(3,),
            seed=0,
            length=40,
            write_batch=write_batch,
        )
        assert ours == expected


def test_draws_do_not_depend_on_what_is_written_together(pair):
    _, model, params, _ = pair
    prompts = [[5, 6, 7]] * 4
    ours = [
        write_answers(
            model,
            params,
            prompts,
            SamplingOptions(1.0),
            max_new_tokens=6,
            stop_ids=(3,),
            seed=seed,
            length=40,
            write_batch=write_batch,
        )
        for seed, write_batch in ((1, None), (1, 2), (2, None))
    ]
    assert ours[0] == ours[1]
    assert ours[0] != ours[2]
    assert len({tuple(row) for row in ours[0]}) == 4


def test_answers_stand_where_their_log_probabilities_are_taken(pair, tmp_path):
    theirs, model, params, directory = pair
    tokenizer = qwen_jax.load_tokenizer(directory)
    options = dataclasses.replace(OPTIONS, temperature=0.8, updates=2)
    data = run_options(directory, prompt_file(tmp_path / "prompts.jsonl")).data
    records = PromptRecords(data)
    prompts = [[5, 6, 7], list(range(9, 30)), [40] * 11]
    own = [records[0, i] for i in range(3)]
    rollout = roll_out(
        model, params, tokenizer, prompts, own, options, stop_ids=(3,), seed=3, length=96
    )
    # One group more than there are prompts: what fills up the last batch.
    answers = to_learn(rollout, options, 4, 96)
    old = jax.jit(lambda p: score(model, p, answers.batch, EXACT, 0.8).log_probs)(params)
    old = np.asarray(old)
    rows = [ids for group in rollout.answers for ids in group]
    assert len({tuple(ids) for ids in rows}) > 6
    for row, ids in enumerate(rows):
        prompt = prompts[row // 3]
        text = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            logits = theirs(text).logits[0, len(prompt) - 1 : -1]
        logs = torch.log_softmax(logits / 0.8, -1)
        expected = logs.gather(-1, torch.tensor(ids)[:, None])[:, 0].numpy()
        found = old[row][answers.batch.loss_weights[row][1:].nonzero()[0]]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not answers.batch.attention_mask[9:].any()
    assert np.abs(answers.advantages[:9]).max() > 0
    # The first update is on the policy: as good as without log-probabilities from before.
    loss = jax.jit(lambda params, some: grpo(options).loss(model, params, some, EXACT)[1])
    ahead, behind = (loss(params, some) for some in (answers, answers.replace(old=old)))
    assert behind.clipped == 0
    np.testing.assert_allclose(behind.by_token, ahead.by_token, atol=1e-4)
    np.testing.assert_allclose(ahead.by_answer, -answers.advantages.sum(), atol=1e-4)


def test_cut_answers_count_as_they_are_told():
    answers = [[[8, 9], [8, 3]]]
    cut = np.array([[True, False]])
    rollout = Rollout([[5, 6]], answers, np.array([[0.0, 1.0]]), {}, cut)
    for counts, learned in (("zero", 4), ("judge", 4), ("mask", 2)):
        options = GrpoOptions(group_size=2, max_new_tokens=2, cut_answers=counts)
        weights = to_learn(rollout, options, 1, 6).batch.loss_weights
        assert weights.sum() == learned
    np.testing.assert_array_equal(weights[1], [0, 0, 1, 1, 0, 0])


def test_batches_are_filled_up_with_prompts_that_are_none(pair, tmp_path):
    *_, directory = pair
    data = run_options(directory, prompt_file(tmp_path / "prompts.jsonl")).data
    arrays = {
        "input_ids": np.arange(8).reshape(2, 4),
        "attention_mask": np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool),
        "place": np.array([[0, 3], [0, 0]]),
    }
    prompts, records = read_prompts(arrays, PromptRecords(data))
    assert prompts == [[0, 1, 2]]
    assert records[0].fields["answer"] == "xxxx"
