"""Steps and runs of GRPO: in parts, left and gone on with, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import qwen_jax
from qwen_jax.errors import UserError
from qwen_jax.inference.defaults import GenerationDefaults
from qwen_jax.training import grpo_step
from qwen_jax.training.data import SourceOptions
from qwen_jax.training.data.pipeline import make_loader
from qwen_jax.training.data.prompts import PromptRecords, prompts_form
from qwen_jax.training.grpo_step import make_grpo_evaluation, make_grpo_step
from qwen_jax.training.log_probs import score
from qwen_jax.training.rewards import RewardOptions
from qwen_jax.training.rollouts import read_prompts
from qwen_jax.training.run import run
from qwen_jax.training.train_step import init_train_state
from tests.training.data.conftest import write_lines
from tests.training.prompts import EXACT, OPTIONS, prompt_file, run_options


def first_prompts(directory, tmp_path, tokenizer, **changes):
    """The settings of a run, and its first batch of prompts."""
    whole = run_options(directory, prompt_file(tmp_path / "prompts.jsonl"), **changes)
    form = prompts_form(whole.grpo.group_size, whole.grpo.max_new_tokens)
    return whole, next(iter(make_loader(whole.data, tokenizer, form=form)))


def test_a_batch_scored_in_parts_has_the_log_probabilities_of_the_whole(pair, tmp_path):
    _, model, params, directory = pair
    tokenizer = qwen_jax.load_tokenizer(directory)
    step = dataclasses.replace(EXACT, microbatches=3)
    whole, arrays = first_prompts(directory, tmp_path, tokenizer, step=step)
    other = jax.tree.map(lambda a: 1.1 * a, params)
    state = init_train_state(model, optax.sgd(1.0), params=params)
    seen = []

    def record(state, answers):
        seen.append(answers)
        return state, {"finite": np.array(True)}

    run = make_grpo_step(model, record, tokenizer, whole.data, whole.grpo, step, seed=0)
    run(state.replace(beside={"reference": other}), arrays)
    first, second = seen
    assert first is second
    learned = first.batch.loss_weights[:, 1:] > 0
    for found, its in ((first.old, params), (first.reference, other)):
        expected = jax.jit(lambda p: score(model, p, first.batch, EXACT).log_probs)(its)
        pairs = (np.asarray(a)[:, :-1][learned] for a in (found, expected))
        np.testing.assert_allclose(*pairs, atol=1e-5)
    assert len(set(np.asarray(first.old)[:, :-1][learned])) > 20


def test_answers_end_where_generation_config_says(pair, tmp_path):
    _, model, params, directory = pair
    tokenizer = qwen_jax.load_tokenizer(directory)
    whole, arrays = first_prompts(directory, tmp_path, tokenizer)
    prompts, _ = read_prompts(arrays, PromptRecords(whole.data))
    free = qwen_jax.generate(model, params, prompts, max_new_tokens=7, stop_ids=())
    state = init_train_state(model, optax.sgd(1.0), params=params)

    def evaluate(*defaults):
        answer = make_grpo_evaluation(
            model, tokenizer, whole.data, whole.grpo, "float32", *defaults
        )
        figures = answer(state, [arrays])
        return figures["eval_answer_tokens"], figures["eval_cut_share"]

    firsts = tuple({row[0] for row in free})
    assert not set(firsts) & {*model.config.eos_token_ids, tokenizer.eos_token_id}
    assert evaluate(GenerationDefaults(stop_ids=firsts)) == (1, 0)
    assert evaluate()[0] > 1


def log(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("rollout_seconds", "tokens_per_second", "seconds_per_step")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_a_run_that_goes_on_ends_as_one_that_was_never_left(pair, tmp_path):
    *_, directory = pair
    prompts = prompt_file(tmp_path / "prompts.jsonl")
    whole = run_options(directory, prompts)
    run(whole, tmp_path / "whole", tell=str)
    run(run_options(directory, prompts, num_steps=2), tmp_path / "again", tell=str)
    run(whole, tmp_path / "again", tell=str)
    ours, expected = log(tmp_path / "again"), log(tmp_path / "whole")
    steps = [row for row in expected if "reward" in row]
    assert [row for row in ours if "reward" in row] == steps
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    # Rollouts differ from step to step, and the second update of each is off the policy.
    assert len({row["reward"] for row in steps}) == 4
    assert any(row["clip_share"] > 0 for row in steps)
    assert all(row["kl"] > 0 for row in steps)
    evaluations = [[r for r in rows if "eval_prompts" in r] for rows in (ours, expected)]
    # The shorter run ended with one of its own.
    assert evaluations[0][-1] == evaluations[1][-1]
    assert [r["eval_prompts"] for r in evaluations[1]] == [5]
    files = [
        (tmp_path / w / "model" / "model.safetensors").read_bytes() for w in ("again", "whole")
    ]
    assert files[0] == files[1]
    assert (tmp_path / "whole" / "reward.png").stat().st_size > 5000


def test_what_cannot_be_learned_from_is_refused_before_an_answer_is_written(
    pair, tmp_path, monkeypatch
):
    _, model, params, directory = pair
    tokenizer = qwen_jax.load_tokenizer(directory)
    whole, arrays = first_prompts(directory, tmp_path, tokenizer)
    monkeypatch.setattr(grpo_step, "roll_out", None)

    def make(model=model, step=EXACT):
        return make_grpo_step(model, None, tokenizer, whole.data, whole.grpo, step, seed=0)

    with pytest.raises(UserError, match="microbatches = 4 do not divide the batch's 6 rows"):
        make(step=dataclasses.replace(EXACT, microbatches=4))
    # Neither a reference beside it nor adapters: it would be its own, and never far from it.
    state = init_train_state(model, optax.sgd(1.0), params=params)
    with pytest.raises(ValueError, match="give the parameters to compare with: "):
        make()(state, arrays)
    config = dataclasses.replace(model.config, eos_token_ids=())
    monkeypatch.setattr(type(tokenizer), "eos_token_id", None)
    with pytest.raises(UserError, match="names an eos token, so that no answer ends; name one"):
        make(model.clone(config=config))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="grpo: 2 processes; answers are written by one process"):
        make()


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"answer": "4"}, {}, "prompts.jsonl:1: has neither text nor messages|messages is missing"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, {}, "ends with the assistant"),
        ({"messages": [{"role": "user", "content": "a" * 90}]}, {}, "of the row's 96 are for pro"),
        ({}, {"batch_size": 8}, "leaves a process 8 rows, and a prompt's answers take 3"),
        ({}, {"pack": True}, "pack = True: each answer to a prompt has a row"),
        ({}, {"length": 7}, "length = 7 leaves no room for a prompt"),
        ({}, {"too_long": "truncate"}, "too_long = truncate would ask something else"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(pair, tmp_path, row, options, message):
    *_, directory = pair
    fine = {"messages": [{"role": "user", "content": "a"}], "answer": "4"}
    path = write_lines(tmp_path / "prompts.jsonl", [row or fine])
    source = SourceOptions(path, too_long=options.pop("too_long", None))
    whole = run_options(directory, path)
    data = dataclasses.replace(whole.data, sources=(source,), **options)
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(whole, data=data), tmp_path / "run", tell=str)


def test_a_record_without_its_answer_is_named(pair, tmp_path):
    *_, directory = pair
    row = {"messages": [{"role": "user", "content": "a"}]}
    path = write_lines(tmp_path / "prompts.jsonl", [row])
    exact = dataclasses.replace(OPTIONS, rewards=(RewardOptions("exact"),))
    options = dataclasses.replace(run_options(directory, path), grpo=exact)
    with pytest.raises(UserError, match=r"prompts.jsonl:1: answer is missing; the reward exact"):
        run(options, tmp_path / "run", tell=str)


def test_grpo_goes_with_no_other_objective_and_no_fresh_model(pair, tmp_path):
    *_, directory = pair
    whole = run_options(directory, "x.jsonl")
    with pytest.raises(UserError, match="grpo with from_scratch: there is no model yet"):
        dataclasses.replace(whole, from_scratch=True)
