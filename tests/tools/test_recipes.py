"""Every recipe of training: its settings are accepted, and its small variant runs, if smaller."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers

import qwen_jax
from configs.train import moe_balance
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.peft_reader import load_adapter
from qwen_jax.embedded.build import write_base
from qwen_jax.embedded.samples import pairs, write_samples
from qwen_jax.errors import UserError
from qwen_jax.nn.low_rank import attach, low_rank_weights
from qwen_jax.training.distillation import DistillationOptions
from qwen_jax.training.lora import LoraOptions
from qwen_jax.training.preference import PreferenceOptions
from qwen_jax.training.run import RunOptions, run
from qwen_jax.training.run_options import ConfigChanges
from qwen_jax.training.upcycle import UpcycleOptions
from tests.sharding.models import CONFIGS
from tests.tools.conftest import train_log
from tools.config_flag import from_config

# Of each recipe, what stands behind the colon; of the small ones in an order in which they run.
FULL = {
    "pretrain": ("general", "reasoning", "long", "64k", "128k", "256k"),
    "sft": ("chats.jsonl",),
    "lora": ("chats.jsonl",),
    "dpo": ("pairs.jsonl", "pairs.jsonl,lora"),
    "distil": ("chats.jsonl",),
    "grpo": ("prompts.jsonl",),
    "upcycle": ("",),
    "moe_balance": tuple(moe_balance.ARMS),
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 16,
}
STEPS = 2


def options_of(recipe, argument):
    config = importlib.import_module(f"configs.train.{recipe}").get_config(argument)
    fields = {name: config[name] for name in config if name != "preset"}
    return from_config(fields, RunOptions, "config")


def small(recipe, argument, num_steps=STEPS, **changes):
    """A small recipe's options, with few steps and rows."""
    options = options_of(recipe, argument)
    data = {"batch_size": 2, "threads": 0, "packing_rows": 2}
    optimiser = dataclasses.replace(
        options.optimiser,
        schedule="constant",
        warmup_steps=0,
        decay_steps=0,
        final_learning_rate=0.0,
    )
    loop = dataclasses.replace(
        options.loop, num_steps=num_steps, checkpoint_every=STEPS, eval_every=num_steps
    )
    options = dataclasses.replace(
        options,
        data=dataclasses.replace(options.data, **data),
        eval_data=dataclasses.replace(options.eval_data, **data),
        optimiser=optimiser,
        loop=loop,
        report=dataclasses.replace(options.report, every=1),
    )
    return dataclasses.replace(options, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that runs a small recipe, and those before it, once."""
    folder = tmp_path_factory.mktemp("recipes")
    root = folder / "runs" / "small"
    write_samples(root / "data", 30, 4, seed=0)
    write_base(root / "base", 0, **TINY)
    write_base(root / "student", 0, **TINY | {"num_hidden_layers": 1})
    done, told = {}, {}

    def make(name, recipe, argument, **changes):
        if name not in done:
            options = small(recipe, argument, **changes)
            # Its paths are relative to where one stands.
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                run(options, root / name, tell=told.setdefault(name, []).append)
            done[name] = root / name
        return done[name]

    stages = [("general",), ("reasoning", "general"), ("long", "reasoning")]

    def chain(name):
        for stage, *_ in stages:
            make(stage, "pretrain", f"{stage},small")
            if stage == name:
                return done[stage]
        return make("sft", "sft", "small")

    make.chain, make.folder, make.told = chain, folder, told
    return make


def rows(workdir):
    found = train_log(workdir)
    return [r for r in found if "loss" in r], [r for r in found if "eval_loss" in r]


def config_of(workdir):
    return json.loads((workdir / "model" / "config.json").read_text())


@pytest.mark.parametrize(
    ("recipe", "argument"), [(name, one) for name, all_ in FULL.items() for one in all_]
)
def test_settings_are_accepted_at_full_size_and_small(recipe, argument):
    full = options_of(recipe, argument)
    words = [word for word in argument.split(",") if not word.endswith(".jsonl")]
    tiny = options_of(recipe, ",".join([*words, "small"]).lstrip(","))
    for name in ("preference", "distillation", "grpo", "upcycle", "lora", "changes"):
        assert (getattr(full, name) is None) == (getattr(tiny, name) is None)
    assert tiny.eval_data is not None
    assert tiny.data.batch_size * tiny.data.length <= 8192
    assert tiny.data.length <= full.data.length


def test_a_stage_that_is_none_is_refused():
    with pytest.raises(UserError, match="give one of general, reasoning, long, 64k, 128k, 256k"):
        options_of("pretrain", "middle,small")


def test_stages_go_on_from_each_other_and_the_last_raises_theta_and_length(trained):
    last = trained.chain("long")
    before = config_of(trained.chain("reasoning"))
    after = config_of(last)
    assert (before["rope_theta"], before["max_position_embeddings"]) == (1e4, 256)
    assert (after["rope_theta"], after["max_position_embeddings"]) == (1e6, 1024)
    training, evaluations = rows(last)
    assert [row["step"] for row in training] == [1, 2]
    assert evaluations[-1]["eval_tokens"] > 100
    model = transformers.AutoModelForCausalLM.from_pretrained(last / "model")
    assert model.config.max_position_embeddings == 1024
    assert model.model.rotary_emb.inv_freq[-1] < 1e-5


def test_lengths_and_theta_go_on_as_in_qwen2_5_1m(trained):
    """Bases of 1, 5 and 10 million for 64k, 128k and 256k tokens (arXiv 2501.15383)."""
    stages = {name: options_of("pretrain", name) for name in ("64k", "128k", "256k")}
    assert [(o.data.length, o.changes.rope_theta) for o in stages.values()] == [
        (65_536, 1e6),
        (131_072, 5e6),
        (262_144, 1e7),
    ]
    for options in stages.values():
        assert [source.weight for source in options.data.sources] == [0.75, 0.25]
    trained.chain("long")
    after = config_of(trained("64k", "pretrain", "64k,small"))
    assert (after["rope_theta"], after["max_position_embeddings"]) == (1e6, 2048)


def test_adapters_and_fine_tuning_begin_with_what_was_pretrained(trained):
    sft = trained.chain("sft")
    assert config_of(sft)["rope_theta"] == 1e6
    lora = trained("lora", "lora", "small")
    assert (lora / "adapter" / "adapter_config.json").exists()
    # The same model, chats and order.
    assert rows(lora)[0][0]["loss"] == pytest.approx(rows(sft)[0][0]["loss"], rel=1e-5)


def test_experts_are_cut_of_what_was_pretrained(trained):
    workdir = trained.chain("reasoning") and trained("upcycle", "upcycle", "small")
    config = config_of(workdir)
    assert (config["model_type"], config["num_experts"]) == ("qwen3_moe", 8)
    training, evaluations = rows(workdir)
    assert training[0]["busiest_expert"] >= 1
    assert np.isfinite(evaluations[-1]["eval_balance_loss"])
    transformers.AutoModelForCausalLM.from_pretrained(workdir / "model")


def test_experts_are_balanced_in_another_way(trained):
    trained.chain("reasoning")
    trained("upcycle", "upcycle", "small")
    workdir = trained("moe_balance", "moe_balance", "loss_free,small")
    training, evaluations = rows(workdir)
    assert training[0]["router/max_vio"] >= 0 and "router/load" not in training[0]
    assert np.isfinite(evaluations[-1]["eval_router/max_vio_batch"])
    layers = [json.loads(line) for line in (workdir / "router.jsonl").open()]
    shape = np.shape(next(row for row in layers if "router" in row)["router"]["load"])
    assert shape == (config_of(workdir)["num_hidden_layers"], 8)
    # What balances without a loss is part of the model.
    assert config_of(workdir)["router_score_bias"] is True
    model, params = qwen_jax.load_pretrained(workdir / "model")
    biases = [params[name]["mlp"]["gate"]["score_bias"] for name in params if "layers_" in name]
    moved = STEPS * 1e-3
    assert model.config.moe.score_bias
    assert all(0 < np.abs(bias).max() <= moved + 1e-6 for bias in biases)


def test_a_student_learns_from_the_fine_tuned(trained):
    trained.chain("sft")
    workdir = trained("distil", "distil", "small")
    training, evaluations = rows(workdir)
    for row in training:
        mean = 0.9 * row["kl"] + 0.1 * row["cross_entropy"]
        assert row["loss"] == pytest.approx(mean, rel=1e-5)
    assert evaluations[-1]["eval_kl"] > 0
    assert config_of(workdir)["num_hidden_layers"] == 1


def test_preferences_go_on_where_they_stopped_and_on_a_mesh(trained):
    trained.chain("sft")
    whole = trained("dpo", "dpo", "small", num_steps=4)
    training, evaluations = rows(whole)
    assert training[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert training[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert training[3]["loss"] != training[0]["loss"]
    assert 0 <= evaluations[-1]["eval_accuracy"] <= 1
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained.folder)
        for steps in (2, 4):
            run(small("dpo", "small", num_steps=steps), trained.folder / "again", tell=str)
        mesh = small("dpo", "small", mesh="fsdp:2,tensor:2")
        mesh = dataclasses.replace(mesh, data=dataclasses.replace(mesh.data, batch_size=4))
        alone = dataclasses.replace(mesh, mesh=None)
        run(mesh, trained.folder / "mesh", tell=str)
        run(alone, trained.folder / "alone", tell=str)
    again, _ = rows(trained.folder / "again")
    # Bit for bit, though the reference is in no checkpoint.
    for name in ("loss", "margin", "grad_norm"):
        assert [row[name] for row in again] == [row[name] for row in training]
    for ours, expected in zip(
        rows(trained.folder / "mesh")[0], rows(trained.folder / "alone")[0], strict=True
    ):
        for name in ("loss", "grad_norm", "chosen_reward"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)
    # No copy of the reference was written.
    state = whole / "checkpoints" / "4" / "state"
    names = json.dumps(json.loads((state / "_METADATA").read_text()))
    assert "params" in names
    assert "reference" not in names


def test_preferences_with_adapters_leave_an_adapter(trained):
    trained.chain("sft")
    workdir = trained("dpo-lora", "dpo", "small,lora")
    assert rows(workdir)[0][0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    tensors = safetensors.numpy.load_file(workdir / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)


def test_adapters_beside_four_bits_learn_as_beside_what_the_bits_stand_for(trained):
    few = trained.folder / "int4"
    convert(trained.chain("long") / "model", few, "hf", quantize="int4")
    workdirs = {
        packed: trained(f"lora packed={packed}", "lora", "small", model=str(few), packed=packed)
        for packed in (True, False)
    }
    ours, expected = (rows(workdirs[packed])[0] for packed in (True, False))
    assert [row["step"] for row in ours] == [1, 2]
    for row, wanted in zip(ours, expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4)
    model, params = qwen_jax.load_pretrained(few, weights="packed")
    adapter = load_adapter(workdirs[True] / "adapter", model.config)
    ids = np.arange(9)[None]
    run_model = jax.jit(lambda params: model.apply({"params": params}, ids).logits)
    moved = run_model(attach(params, adapter)) - run_model(params)
    assert np.isfinite(moved).all()
    assert np.abs(moved).max() > 1e-4
    # What was held is the packed base, and of each adapter its scale.
    held = sum(leaf.size for leaf in jax.tree.leaves(params)) + len(list(low_rank_weights(adapter)))
    assert f"parameters frozen: {held:,} numbers" in trained.told["lora packed=True"][0]


def test_answers_are_written_judged_and_learned_behind_a_short_start(trained):
    start = trained("grpo-start", "grpo", "start")
    assert rows(start)[1][-1]["eval_tokens"] > 20
    small_options = small("grpo", "small")
    data = dataclasses.replace(small_options.data, batch_size=8)
    workdir = trained("grpo", "grpo", "small", data=data)
    training, _ = rows(workdir)
    assert [row["step"] for row in training] == [1, 2]
    assert all(0 <= row["reward"] <= 1 and row["answer_tokens"] > 0 for row in training)
    lines = train_log(workdir)
    assert [line["eval_prompts"] for line in lines if "eval_prompts" in line] == [4]
    assert (workdir / "reward.png").exists()


def test_wrong_answers_are_wrong_and_held_out_problems_are_not_trained_on():
    train, held_out = (list(pairs(0, 200, is_held_out)) for is_held_out in (False, True))
    for pair in (*train, *held_out):
        assert pair["chosen"]["content"] != pair["rejected"]["content"]
    asked = [{pair["prompt"][0]["content"] for pair in part} for part in (train, held_out)]
    assert not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preference": PreferenceOptions(), "distillation": DistillationOptions("a")},
            "preference and distillation: a run has one objective; leave one out",
        ),
        (
            {"preference": PreferenceOptions(), "from_scratch": True},
            "preference with from_scratch: there is no model yet",
        ),
        (
            {"upcycle": UpcycleOptions(4, 2, 8), "from_scratch": True},
            "upcycle with from_scratch: there is no dense model yet",
        ),
        (
            {"lora": LoraOptions(), "upcycle": UpcycleOptions(4, 2, 8)},
            "lora with upcycle: adapters belong to a checkpoint",
        ),
        (
            {"lora": LoraOptions(), "changes": ConfigChanges(rope_theta=1e6)},
            "lora with changes: adapters belong to a checkpoint",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(options_of("sft", "chats.jsonl"), **changes)


def test_a_change_that_is_none_is_refused():
    with pytest.raises(UserError, match="rope_theta = -1 must be above 0"):
        ConfigChanges(rope_theta=-1)


def test_changes_of_routers_change_nothing_else():
    config = CONFIGS["moe"]
    changes = ConfigChanges(renormalise=False, score_bias=True)
    moe = dataclasses.replace(config.moe, renormalise=False, score_bias=True)
    assert changes.of(config) == dataclasses.replace(config, moe=moe)
    # What is given may be False, and what is not given stays.
    assert ConfigChanges(score_bias=False).of(changes.of(config)).moe == dataclasses.replace(
        config.moe, renormalise=False
    )
    assert ConfigChanges().of(config) == config
    for name in ("renormalise", "score_bias"):
        for value in (True, False):
            with pytest.raises(UserError, match=f"^changes.{name}: the model has no experts"):
                ConfigChanges(**{name: value}).of(CONFIGS["dense"])


def test_a_teacher_with_another_tokenizer_is_refused(trained, tmp_path):
    # Merges learned from other words.
    write_base(tmp_path / "other", 7, **TINY)
    options = small("distil", "small")
    wanted = dataclasses.replace(options.distillation, teacher=str(tmp_path / "other"))
    options = dataclasses.replace(options, distillation=wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained.folder)
        with pytest.raises(UserError, match="its tokenizer is not the model's"):
            run(options, tmp_path / "run", tell=str)
