"""GRPO against a rendering in PyTorch, its rollouts against `generate`, and runs that go on."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
import torch

import qwen_jax
from qwen_jax.errors import UserError
from qwen_jax.inference.defaults import GenerationDefaults
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.sharding.axes import as_mesh
from qwen_jax.training import grpo_step
from qwen_jax.training.batch import Batch
from qwen_jax.training.data import DataOptions, SourceOptions
from qwen_jax.training.data.pipeline import make_loader
from qwen_jax.training.data.prompts import PromptRecords, prompts_form
from qwen_jax.training.grpo import Answers, GrpoOptions, advantages_of, grpo
from qwen_jax.training.grpo_step import make_grpo_evaluation, make_grpo_step
from qwen_jax.training.log_probs import score
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.rewards import RewardOptions
from qwen_jax.training.rollouts import Rollout, read_prompts, roll_out, to_learn, write_answers
from qwen_jax.training.run import run
from qwen_jax.training.run_options import RunOptions
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.train_step import init_train_state, make_train_step
from tests.reference import random_reference, save_reference
from tests.sharding.models import CONFIGS, one_device
from tests.training.data.conftest import write_lines, write_tokenizer
from tests.training.published import published

EXACT = TrainOptions(dtype="float32", scan=False, remat="none", block_size=16)
B, T = 6, 14


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model in both engines, and a directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    reference = random_reference("qwen3", num_hidden_layers=2, head_dim=16)
    save_reference(reference, directory)
    write_tokenizer(directory)
    return reference, *qwen_jax.load_pretrained(directory), directory


def answers_batch(vocab_size):
    """Prompts and answers of unlike lengths; a row of which nothing is learned, one that is none.

    Weights stand where the answers do, mask and weights as `to_learn` makes them.
    """
    rng = np.random.default_rng(4)
    ids = rng.integers(0, vocab_size, (B, T)).astype(np.int32)
    begins, ends = rng.integers(2, 6, (B, 1)), rng.integers(8, T + 1, (B, 1))
    ends[-1] = 0
    places = np.arange(T)
    mask = places < ends
    weights = (mask & (places >= begins)).astype(np.float32)
    weights[2] = 0
    advantages = np.array([1.2, -0.9, 0.7, -1.5, 0.4, 0.0], np.float32)
    return Batch(ids, loss_weights=weights, attention_mask=mask), advantages


def torch_logs(model, batch, temperature):
    """Log-probabilities [B, T-1] of each token's successor."""
    ids = torch.as_tensor(batch.input_ids).long()
    mask = torch.as_tensor(batch.attention_mask).long()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits / temperature, -1).gather(-1, ids[:, 1:, None])[..., 0]


def torch_grpo(logs, old, reference, batch, advantages, options):
    """Equation 3 of DeepSeekMath with two clips, and the three ways of adding up."""
    mask = torch.as_tensor(batch.loss_weights)[:, 1:]
    advantage = torch.as_tensor(advantages)[:, None]
    ratio = torch.exp(logs - old)
    low, high = 1 - options.clip_low, 1 + options.clip_high
    losses = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    difference = reference - logs
    kl = torch.exp(difference) - difference - 1
    losses = (losses + options.kl * kl) * mask
    counts = mask.sum(-1)
    match options.aggregation:
        case "sequence":
            loss = (losses.sum(-1) / counts.clamp(min=1)).sum() / (counts > 0).sum()
        case "token":
            loss = losses.sum() / mask.sum()
        case "fixed":
            loss = losses.sum() / ((counts > 0).sum() * options.max_new_tokens)
    up = (ratio > high) & (advantage > 0) & (mask > 0)
    down = (ratio < low) & (advantage < 0) & (mask > 0)
    metrics = {
        "loss": loss,
        "clip_share": (up | down).sum() / mask.sum(),
        "entropy": -(logs * mask).sum() / mask.sum(),
        "kl": (kl * mask).sum() / mask.sum(),
        "tokens": mask.sum(),
    }
    return loss, {k: v.item() for k, v in metrics.items()}, (up.sum().item(), down.sum().item())


@pytest.mark.parametrize(
    "options",
    [
        GrpoOptions(kl=0.3, clip_low=0.2, clip_high=0.2, aggregation="sequence"),
        GrpoOptions(kl=0.1, clip_low=0.1, clip_high=0.4, aggregation="token", temperature=0.7),
        GrpoOptions(clip_high=0.3, aggregation="fixed", max_new_tokens=9, temperature=1.3),
    ],
    ids=lambda options: options.aggregation,
)
def test_loss_metrics_and_gradients_equal_the_papers_in_torch(pair, options):
    theirs, model, params, _ = pair
    batch, advantages = answers_batch(model.config.vocab_size)
    theirs.zero_grad()
    logs = torch_logs(theirs, batch, options.temperature)
    rng = np.random.default_rng(5)
    # Some tokens are far likelier and some far less likely than they were; others between.
    old, reference = (
        logs.detach() + torch.tensor(rng.normal(0, scale, logs.shape), dtype=torch.float32)
        for scale in (0.8, 0.6)
    )
    loss, metrics, clipped = torch_grpo(logs, old, reference, batch, advantages, options)
    loss.backward()
    assert min(clipped) >= 1
    if not options.kl:
        del metrics["kl"]

    def padded(values):
        return np.pad(values.numpy(), ((0, 0), (0, 1)), constant_values=np.nan)

    answers = Answers(batch, advantages, padded(old), padded(reference) if options.kl else None)
    objective = grpo(options)

    @jax.jit
    def both(params):
        found, sums = objective.loss(model, params, answers, EXACT)
        return found, objective.metrics(sums, EXACT)

    (ours, found), gradients = jax.value_and_grad(both, has_aux=True)(params)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5, atol=1e-6)
    assert found.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    wanted = dict(theirs.named_parameters())
    for name, gradient in published(model.config, gradients).items():
        grad = wanted[name].grad.numpy()
        atol = 1e-4 * np.abs(grad).max()
        np.testing.assert_allclose(gradient, grad, rtol=0, atol=atol, err_msg=name)


def test_parts_of_a_batch_on_a_mesh_give_the_update_of_the_whole_on_one_device():
    model, params = one_device(CONFIGS["moe"])
    batch, advantages = answers_batch(model.config.vocab_size)
    rng = np.random.default_rng(6)
    logs = np.asarray(jax.jit(lambda p: score(model, p, batch, EXACT, 0.8).log_probs)(params))
    old, reference = (logs + rng.normal(0, 0.4, logs.shape).astype(np.float32) for _ in range(2))
    answers = jax.tree.map(lambda a: a[:4], Answers(batch, advantages, old, reference))
    options = dataclasses.replace(EXACT, balance_loss=0.7, router_z_loss=0.1)
    objective = grpo(GrpoOptions(kl=0.2, aggregation="sequence", temperature=0.8))

    def update(mesh, parts):
        bound = model.clone(mesh=as_mesh(mesh))
        split = dataclasses.replace(options, microbatches=parts)
        state = init_train_state(bound, optax.sgd(1.0), params=params)
        step = make_train_step(bound, optax.sgd(1.0), split, objective=objective)
        after, metrics = step(state, answers)
        return jax.tree.map(lambda a, b: np.asarray(a) - b, params, after.params), metrics

    ours, expected = update("fsdp:2,tensor:2", 2), update(None, 1)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), ours[0], expected[0])
    jax.tree.map(lambda a, b: close(a, b, 1e-5), ours[1], expected[1])


def close(ours, expected, tolerance):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 3.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    bare = [[0.5, -0.5, -0.5, 0.5], [-0.75, 2.25, -0.75, -0.75], [0, 0, 0, 0]]
    np.testing.assert_array_equal(advantages_of(rewards, normalise=False), bare)
    # The sample's deviations are 1 / sqrt(3), 1.5 and 0.
    stds = np.array([[3**-0.5], [1.5], [0.0]]) + 1e-4
    np.testing.assert_allclose(advantages_of(rewards), bare / stds, rtol=1e-6)
    theirs = torch.as_tensor(rewards).std(dim=1, keepdim=True).numpy() + 1e-4
    np.testing.assert_allclose(advantages_of(rewards), bare / theirs, rtol=1e-6)


def vowels(record, text):
    """A reward that random answers differ in."""
    return sum(c in "aeiou" for c in text) / (1 + len(text)) + len(record["answer"])


VOWELS = RewardOptions(f"{__name__}:vowels")
# Random models hardly ever end a text.
OPTIONS = GrpoOptions((VOWELS,), group_size=3, max_new_tokens=7, cut_answers="judge")


def prompt_file(path, count=5):
    rows = [
        {
            "messages": [{"role": "user", "content": "the " * (i % 3) + f"{i}?"}],
            "answer": "x" * i,
            "enable_thinking": i % 2 == 0,
        }
        for i in range(1, count + 1)
    ]
    return write_lines(path, rows)


def run_options(directory, prompts, num_steps=4, **changes):
    source = SourceOptions(prompts)
    data = DataOptions((source,), length=96, batch_size=6, pack=False, threads=0)
    fields = {
        "model": str(directory),
        "data": data,
        "eval_data": dataclasses.replace(data, batch_size=4, epochs=1),
        "grpo": dataclasses.replace(OPTIONS, updates=2, kl=0.1),
        "optimiser": OptimiserOptions(learning_rate=3e-3, schedule="constant", warmup_steps=0),
        "step": EXACT,
        "loop": LoopOptions(num_steps, checkpoint_every=2, eval_every=4),
    }
    return RunOptions(**fields | changes)


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


def test_cut_answers_count_as_they_are_told():
    answers = [[[8, 9], [8, 3]]]
    cut = np.array([[True, False]])
    rollout = Rollout([[5, 6]], answers, np.array([[0.0, 1.0]]), {}, cut)
    for counts, learned in (("zero", 4), ("judge", 4), ("mask", 2)):
        options = GrpoOptions(group_size=2, max_new_tokens=2, cut_answers=counts)
        weights = to_learn(rollout, options, 1, 6).batch.loss_weights
        assert weights.sum() == learned
    np.testing.assert_array_equal(weights[1], [0, 0, 1, 1, 0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size = 1 must be at least 2"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p = 1.5 must be above 0 and at most 1"),
        ({"clip_low": 1.0}, "clip_low = 1.0 must be above 0 and below 1"),
        ({"kl": -0.1}, "kl = -0.1 must be at least 0"),
        ({"updates": 0}, "updates = 0 must be at least 1"),
        ({"aggregation": "mean"}, "aggregation = mean is not supported; known: sequence, token"),
        ({"cut_answers": "drop"}, "cut_answers = drop is not supported; known: zero, judge, mask"),
        ({"rewards": ()}, "rewards is empty"),
        ({"rewards": (VOWELS, VOWELS)}, "give each once"),
    ],
)
def test_options_that_are_none_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        GrpoOptions(**changes)


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


def test_grpo_goes_with_no_other_objective_and_no_fresh_model(pair, tmp_path):
    *_, directory = pair
    whole = run_options(directory, "x.jsonl")
    with pytest.raises(UserError, match="grpo with from_scratch: there is no model yet"):
        dataclasses.replace(whole, from_scratch=True)
