"""The study of balancing, made small: what arms share, what is measured, resumed and reported."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.moe_balance import study
from experiments.moe_balance.arms import ARMS, GLOBAL, MICRO, NONE, SWITCHES, find_arms
from experiments.moe_balance.effects import EFFECTS, findings
from experiments.moe_balance.published import PUBLISHED
from experiments.moe_balance.report import write_report
from experiments.moe_balance.training import Sizes, begin, config_of, phases_of
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import parameter_shapes

SIZES = Sizes(steps=10, hidden_size=16, layers=1, length=16)
HALF = "micro 0.1 then global at 50%"
SOME = (
    MICRO,
    HALF,
    "loss-free sign 0.001",
    "expert choice",
    "global 0.01 fine-grained",
    "global 0.01 upcycled",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    arms = find_arms(list(SOME))
    return workdir, arms, study.run(workdir, SIZES, arms, 1, {"origin": 1})


def result_of(results, arm, seed=0):
    (found,) = (r for r in results if (r.arm, r.seed) == (arm, seed))
    return found


def test_names_are_one_arm_each_and_effects_speak_of_arms_that_there_are():
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names) and not any("," in name for name in names)
    used = {side.arm for effect in EFFECTS for side in (effect.one, effect.other)}
    assert used | {row.arm for row in PUBLISHED} <= set(names)
    with pytest.raises(UserError, match="--arms: 'nine' is no arm; known: none; "):
        find_arms(["nine"])
    assert [arm.name for arm in find_arms([GLOBAL])] == [NONE, GLOBAL]


def test_arms_have_as_many_numbers_at_work_for_each_token():
    for arm in ARMS:
        experts = arm.experts
        width = experts.num_experts_per_tok * experts.intermediate_size
        assert width + (experts.shared_intermediate_size or 0) == 64, arm.name


def test_arms_of_the_same_sizes_begin_with_the_same_parameters():
    plain, biased = (begin(SIZES, arm, 3) for arm in find_arms(["loss-free sign 0.001"]))
    assert not biased["layers_0"]["mlp"]["gate"].pop("score_bias").any()
    jax.tree.map(np.testing.assert_array_equal, plain, biased)
    other = begin(SIZES, ARMS[0], 4)
    assert np.any(other["embed_tokens"]["weight"] != plain["embed_tokens"]["weight"])
    # As large as in large models, whatever the width.
    assert 0.01 < np.std(plain["layers_0"]["mlp"]["gate"]["weight"]) < 0.03
    for arm in ARMS:
        shapes = jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(config_of(SIZES, arm)))
        assert jax.tree.leaves(shapes)


def test_every_arm_is_trained_and_measured_on_the_same_texts(done):
    _, arms, results = done
    assert [r.arm for r in results] == [arm.name for arm in arms]
    first = results[0]
    for result in results:
        assert result.domains == first.domains and len(result.losses) == len(first.losses)
        experts = next(arm.experts for arm in arms if arm.name == result.arm)
        E, k = experts.num_experts, experts.num_experts_per_tok
        shape = np.shape(result.by_domain)
        assert shape == (1, 8, E) and np.shape(result.together) == (1, E, E)
        tokens = len(result.losses) * SIZES.length
        assert np.sum(result.by_domain) == np.trace(result.together[0]) == k * tokens
        assert result.history[-1]["saturation"] == 1 and result.history[-1]["step"] == 10
        assert result.history[-1]["loss"] == pytest.approx(result.loss, abs=1e-4)
    steps = [row["step"] for row in first.history]
    assert steps == list(range(11))
    assert first.loss < first.history[0]["loss"] - 0.1
    alike = (NONE, MICRO, HALF, "loss-free sign 0.001", "expert choice")
    before = [result_of(results, arm).by_domain_before for arm in alike]
    assert all(counts == before[0] for counts in before)
    assert len({result_of(results, arm).loss for arm in alike}) == len(alike)


def test_only_assignments_that_look_ahead_are_measured_as_trained_too(done):
    *_, results = done
    for result in results:
        assert (result.trained_losses is not None) == (result.arm == "expert choice")
    result = result_of(results, "expert choice")
    assert np.mean(result.trained_losses) != pytest.approx(result.loss, abs=1e-4)


def test_a_switch_goes_on_with_what_the_other_arm_was_at_that_step(done):
    workdir, _, results = done
    micro, switched = (result_of(results, arm) for arm in (MICRO, HALF))
    half = round(SWITCHES[0] * SIZES.steps)

    def followed(result):
        return [{k: v for k, v in row.items() if k != "saturation"} for row in result.history]

    assert followed(micro)[: half + 1] == followed(switched)[: half + 1]
    assert followed(micro)[half + 1] != followed(switched)[half + 1]
    directories = [
        [directory for _, directory, *_ in phases_of(workdir, SIZES, arm, 0)]
        for arm in find_arms([MICRO, HALF])[1:]
    ]
    assert directories[0][0] == directories[1][0] and directories[0][1] != directories[1][1]


def test_phases_follow_each_other_as_one_run_would(tmp_path):
    # The arm of micro-batches has three, of which none changes anything.
    (_, arm) = find_arms([MICRO])
    whole = dataclasses.replace(arm, name="whole", phases=arm.phases[-1:])
    parts, whole = study.run(tmp_path, SIZES, (arm, whole), 1, {})
    np.testing.assert_allclose(parts.losses, whole.losses, atol=2e-5)
    assert parts.by_domain == whole.by_domain


def test_what_is_upcycled_begins_in_the_middle_with_experts_of_the_dense_model(done):
    *_, results = done
    result = result_of(results, "global 0.01 upcycled")
    steps = [row["step"] for row in result.history]
    assert steps == [5, 6, 7, 8, 9, 10]
    assert result.loads[0][0] > 5


def test_a_run_that_was_cut_goes_on_and_ends_the_same(done, tmp_path):
    _, arms, results = done
    few = arms[:2]
    study.run(tmp_path, SIZES, few, 1, {})
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    # Cut in the middle of the second line, whose arm has ended.
    path.write_bytes(whole[: len(whole) * 2 // 3])
    again = study.run(tmp_path, SIZES, few, 1, {})
    for one, other in zip(again, results, strict=False):
        fields = [dataclasses.replace(r, seconds=0.0) for r in (one, other)]
        assert fields[0] == fields[1]
    before = path.read_bytes()
    assert study.run(tmp_path, SIZES, few, 1, {}) == again and path.read_bytes() == before


def test_arms_side_by_side_end_as_one_after_another(done, tmp_path):
    _, arms, results = done
    # Those that have phases in common among them, whose directory two may not write at once.
    few = arms[:3]
    beside = study.run(tmp_path, SIZES, few, 1, {}, workers=2)
    assert [r.arm for r in beside] == [arm.name for arm in few]
    for one, other in zip(beside, results, strict=False):
        # Of another arm they are a tenth and more away.
        np.testing.assert_allclose(one.losses, other.losses, atol=2e-5)
        assert [row["step"] for row in one.history] == [row["step"] for row in other.history]
    apart = np.abs(np.subtract(results[0].losses, results[1].losses)).max()
    assert apart > 0.1
    # Whatever order they ended in, they are told of in that of the arms.
    path = tmp_path / "results.jsonl"
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True), reverse=True)))
    assert study.read(tmp_path) == beside


def test_the_report_tells_of_all_arms_and_has_its_pictures(done, tmp_path):
    *_, results = done
    report = write_report(tmp_path, SIZES, results)
    assert report == (tmp_path / "report.md").read_text()
    for arm in (NONE, *SOME):
        assert f"| {arm} |" in report
    assert "one model tells nothing of others" in report
    pictures = (
        "effects",
        "effects_loss",
        "trade",
        "loads",
        "history",
        "sweep",
        "domains",
        "layers",
        "together",
    )
    for name in pictures:
        assert f"({name}.png)" in report
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert (tmp_path / "results.csv").read_text().count("\n") == len(results) + 1


def drawn(done, arm, seed, shift=0.0, **figures):
    """A result whose losses and figures are made up."""
    template = done[2][0]
    rng = np.random.default_rng([seed, len(arm)])
    base = np.random.default_rng(seed).normal(2, 0.5, len(template.losses))
    losses = base + shift + 1e-3 * rng.standard_normal(len(base))
    own = {name: [value + 1e-2 * rng.standard_normal()] for name, value in figures.items()}
    return dataclasses.replace(
        template, arm=arm, seed=seed, losses=losses.tolist(), figures={**template.figures, **own}
    )


def test_effects_are_seen_where_the_whole_interval_says_so(done):
    results = [
        drawn(done, arm, seed, shift, max_vio=vio, domain_information=bits)
        for seed in range(4)
        for arm, shift, vio, bits in (
            (NONE, 0.0, 3.0, 0.8),
            (GLOBAL, 0.0, 0.2, 1.2),
            (MICRO, 0.05, 0.2, 0.1),
            (HALF, 0.03, 0.2, 1.5),
        )
    ]
    verdicts = {finding.effect.name: finding.verdict for finding in findings(results)}
    assert verdicts["unbalanced collapses: MaxVio of none is 1 above global 0.1's"] == "seen"
    assert verdicts["global groups specialise more than micro ones: half a bit"] == "seen"
    assert verdicts["micro groups cost loss: above global's"] == "seen"
    late = verdicts["but only a part: less than global from the start"]
    assert late == "not seen, but its reverse"
    one = {f.effect.name: f for f in findings([r for r in results if r.seed == 0])}
    collapse = one["unbalanced collapses: MaxVio of none is 1 above global 0.1's"]
    assert collapse.verdict == "one model tells nothing of others"
    # Of losses there are many texts.
    assert one["micro groups cost loss: above global's"].seen


def test_results_of_another_version_are_refused(done, tmp_path):
    path = tmp_path / "results.jsonl"
    row = dataclasses.asdict(done[2][0])
    del row["history"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"results.jsonl:1: has no history, and is of another vers"):
        study.read(tmp_path)
