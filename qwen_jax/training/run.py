"""A whole run from its settings: model, data, optimiser, loop, and what is left at the end."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.checkpoint.peft_writer import save_adapter
from qwen_jax.checkpoint.writer import copy_companions, save_pretrained, write_json
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config
from qwen_jax.inference.defaults import GenerationDefaults, load_generation_defaults
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.pretrained import load_pretrained, load_tokenizer
from qwen_jax.provenance import provenance
from qwen_jax.sharding.axes import as_mesh, check_mesh
from qwen_jax.sharding.flops import analytic_flops
from qwen_jax.text import Tokenizer, check_vocabulary_fits
from qwen_jax.training.checkpoints import Checkpoints
from qwen_jax.training.curves import REWARD_CURVE, draw_runs
from qwen_jax.training.data import DataOptions
from qwen_jax.training.data.pipeline import make_loader, num_domains
from qwen_jax.training.goal import Goal, choose_goal
from qwen_jax.training.grpo_step import make_grpo_evaluation, make_grpo_step
from qwen_jax.training.loop import train
from qwen_jax.training.lora import add_adapters, is_adapter
from qwen_jax.training.optimisers import make_optimiser, make_schedule
from qwen_jax.training.partition import partition
from qwen_jax.training.placement import in_step, loader_share, to_devices
from qwen_jax.training.report import draw_curve, known_peak, open_sinks
from qwen_jax.training.run_options import RunOptions
from qwen_jax.training.score_bias import fit_biases
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.train_step import (
    TrainState,
    init_train_state,
    make_evaluation,
    make_train_step,
)
from qwen_jax.training.upcycle import upcycle

SETTINGS, MODEL, ADAPTER = "run.json", "model", "adapter"
_PROVENANCE = "provenance.json"
# What may change where a run goes on: how long it is, where it runs, what is told of it.
_FREE = ("loop", "report", "mesh")


def run(
    options: RunOptions,
    workdir: Path,
    config: ModelConfig | None = None,
    tell: Callable[[str], None] = print,
    more: Mapping[str, Any] | None = None,
) -> int:
    """Trains, from the newest checkpoint in `workdir` if there is one.

    At the end `workdir` holds `model/` in Hugging Face's layout, or `adapter/` in PEFT's, beside
    `checkpoints/`, `metrics.jsonl`, `loss.png`, of GRPO `reward.png`, `run.json` with the settings
    and `provenance.json` with the versions and the device.

    Args:
      options: of the run.
      workdir: its directory, which all processes see.
      config: of the model, in place of `options.model`'s; needs `from_scratch`.
      tell: takes lines for people.
      more: settings that are not among the options and decide the run too, for `run.json`.

    Returns:
      The steps that were made; fewer than asked for where the run was told to stop.

    Raises:
      UserError: in one line, whatever is wrong with settings, files, data or the loss.
    """
    if config is not None and not options.from_scratch:
        raise UserError("from_scratch is not set: sizes alone have no parameters to go on from")
    _settle(options, workdir, more or {})
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    model, params = _begin(options, config)
    check_vocabulary_fits(tokenizer, model.config.vocab_size)
    goal = choose_goal(options, model, params, tokenizer)
    data = make_loader(options.data, tokenizer, *loader_share(model.mesh), goal.form)
    trained = None if options.lora is None else is_adapter
    state, optimiser = _state(options, model, params, trained, goal)
    state = state.replace(beside=goal.beside)
    del params
    step_options = _with_domains(options.step, options.data)
    step = make_train_step(model, optimiser, step_options, state, goal.objective)
    place = functools.partial(to_devices, mesh=model.mesh)
    if options.grpo is not None:
        step = make_grpo_step(
            model,
            step,
            tokenizer,
            options.data,
            options.grpo,
            options.step,
            options.seed,
            _generation_defaults(options),
        )
        # Prompts stay on the host, which answers and judges before anything is learned.
        place = dict
    flops = _flops(options, model.config, goal)
    tell(_summary(model, state, options, flops))
    evaluate = _evaluation(options, model, tokenizer, goal)
    # The evaluation's loss tells which checkpoint is the best; rewards have none.
    best = "eval_loss" if evaluate and options.grpo is None else None
    with Checkpoints(workdir, options.loop.keep, best) as checkpoints:
        start = max(checkpoints.steps, default=0)
        state, done = train(
            step,
            state,
            data,
            options.loop,
            checkpoints,
            lambda start: open_sinks(
                workdir, options.report, start, options.loop.num_steps, dataclasses.asdict(options)
            ),
            place=place,
            schedule=_schedule(options, goal),
            evaluate=evaluate,
            flops=flops,
            peak=_peak(options, model),
            every=options.report.every,
        )
    if done > start:
        tell(f"data of this process: {data.counts}")
    target = workdir / (MODEL if options.lora is None else ADAPTER)
    if done == options.loop.num_steps and (done > start or not target.exists()):
        _export(options, target, model, state)
        tell(f"written: {target}")
    if jax.process_index() == 0 and done > start:
        draw_curve(workdir)
        if options.grpo is not None:
            draw_runs([workdir], "reward", workdir / REWARD_CURVE)
    return done


def _settle(options: RunOptions, workdir: Path, more: Mapping[str, Any]) -> None:
    """Writes the settings; checks that a run that goes on is the same run."""
    path = workdir / SETTINGS
    wanted = json.loads(json.dumps({**dataclasses.asdict(options), **more}))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        goes_on = any((workdir / "checkpoints").glob("[0-9]*"))
        before = json.loads(path.read_text()) if goes_on else wanted
        old, new = _flat(before), _flat(wanted)
        for name in {**old, **new}:
            if old.get(name) != new.get(name) and not name.startswith(_FREE):
                raise UserError(
                    f"{path}: the run was begun with {name} = {old.get(name)}, not "
                    f"{new.get(name)}; set it back or give another workdir"
                )
        if jax.process_index() == 0:
            made_with = provenance(options.step.dtype, wanted)
            for target, content in ((path, wanted), (workdir / _PROVENANCE, made_with)):
                temporary = target.with_suffix(".tmp")
                write_json(temporary, content)
                temporary.replace(target)
    except (OSError, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be used ({reason}); give another workdir") from None


def _flat(settings: Any, place: str = "") -> dict[str, Any]:
    """Settings by their path."""
    if isinstance(settings, dict):
        pairs = settings.items()
    elif isinstance(settings, list):
        pairs = enumerate(settings)
    else:
        return {place: settings}
    return {
        name: value
        for key, part in pairs
        for name, value in _flat(part, f"{place}.{key}" if place else str(key)).items()
    }


def _begin(options: RunOptions, config: ModelConfig | None) -> tuple[Decoder, Any]:
    """The model, and the parameters to begin with; None where they are drawn."""
    if not options.from_scratch:
        weights = "packed" if options.packed else "dense"
        dtype = options.step.dtype if options.lora else "float32"
        model, params = load_pretrained(options.model, dtype, options.mesh, weights=weights)
        if options.upcycle is not None:
            key = jax.random.key(options.seed)
            config, params = upcycle(model.config, params, options.upcycle, key, model.mesh)
            model = _decoder(config, model.mesh)
        model = _changed(options, model)
        return model, fit_biases(model.config, params)
    if config is None:
        config = load_config(resolve_source(options.model, weights=False))
    return _changed(options, _decoder(config, as_mesh(options.mesh))), None


def _decoder(config: ModelConfig, mesh: Mesh | None) -> Decoder:
    if mesh is not None:
        check_mesh(config, mesh, parameter_shapes(config))
    return Decoder(config, mesh=mesh)


def _changed(options: RunOptions, model: Decoder) -> Decoder:
    if options.changes is None:
        return model
    return model.clone(config=options.changes.of(model.config))


def _evaluation(
    options: RunOptions, model: Decoder, tokenizer: Tokenizer, goal: Goal
) -> Callable[[TrainState], dict[str, float]] | None:
    """Of a state, the figures of all of `options.eval_data`; None without them."""
    data = options.eval_data
    if data is None:
        return None
    share = loader_share(model.mesh)
    if options.grpo is not None:
        answer = make_grpo_evaluation(
            model, tokenizer, data, options.grpo, options.step.dtype, _generation_defaults(options)
        )
        return lambda state: answer(state, make_loader(data, tokenizer, *share, goal.eval_form))
    loss = make_evaluation(model, _with_domains(options.step, data), goal.objective)

    def evaluate(state: TrainState) -> dict[str, float]:
        batches = in_step(make_loader(data, tokenizer, *share, goal.eval_form))
        return loss(
            state.to_run(),
            (to_devices(batch, model.mesh) for batch in batches),
            state.beside,
        )

    return evaluate


def _with_domains(step: TrainOptions, data: DataOptions) -> TrainOptions:
    """Step options whose figures of routers tell sources apart, where rows say theirs."""
    balance = dataclasses.replace(step.balance, num_domains=num_domains(data))
    return dataclasses.replace(step, balance=balance)


def _generation_defaults(options: RunOptions) -> GenerationDefaults:
    return load_generation_defaults(
        resolve_source(options.model or options.tokenizer, weights=False)
    )


def _schedule(options: RunOptions, goal: Goal) -> optax.Schedule:
    """The learning rate by the steps of the loop that were made."""
    schedule = make_schedule(options.optimiser, options.loop.num_steps * goal.updates)
    return lambda step: schedule(step * goal.updates)


def _state(
    options: RunOptions, model: Decoder, params: Any, trained: Any, goal: Goal
) -> tuple[TrainState, optax.GradientTransformation]:
    key, steps = jax.random.key(options.seed), options.loop.num_steps * goal.updates
    if options.lora is not None:
        params = add_adapters(params, options.lora, key)
    shapes = parameter_shapes(model.config) if params is None else params
    if trained is not None:
        shapes = partition(shapes, trained)[0]
    optimiser = make_optimiser(options.optimiser, steps, shapes)
    stacked = options.step.scan
    if params is None:
        return init_train_state(model, optimiser, key=key, stacked=stacked), optimiser
    state = init_train_state(model, optimiser, params=params, trained=trained, stacked=stacked)
    return state, optimiser


def _flops(options: RunOptions, config: ModelConfig, goal: Goal) -> float:
    """Operations of a step that the mathematics asks for, on all devices together.

    Those of writing answers are not among them.
    """

    def train(config: ModelConfig) -> float:
        data = options.data
        return sum(analytic_flops(config, "train", data.batch_size, data.length).values())

    # Of a step, a third is its forward pass.
    steps = goal.updates * train(config)
    return float(steps + sum(train(other) / 3 for other in goal.forward))


def _peak(options: RunOptions, model: Decoder) -> float | None:
    devices = jax.devices()[:1] if model.mesh is None else list(model.mesh.devices.flat)
    if options.report.peak_flops is not None:
        return options.report.peak_flops * len(devices)
    return known_peak(devices)


def _summary(model: Decoder, state: TrainState, options: RunOptions, flops: float) -> str:
    """Parameters, memory and work, a line each."""
    sizes = {
        "parameters trained": state.params,
        "parameters frozen": state.frozen,
        "parameters beside": state.beside,
        "optimiser": state.opt_state,
    }
    lines = []
    for name, tree in sizes.items():
        leaves = jax.tree.leaves(tree)
        if leaves:
            held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
            count = sum(leaf.size for leaf in leaves)
            lines.append(f"{name}: {count:,} numbers, {held / 1e6:,.1f} MB a device")
    tokens = options.data.batch_size * options.data.length
    mesh = options.mesh or "one device"
    lines.append(f"gradients: {_nbytes(state.params) / 1e6:,.1f} MB in all; mesh: {mesh}")
    lines.append(
        f"step: {options.data.batch_size} rows of {options.data.length}, {tokens:,} tokens, "
        f"{flops / 1e12:.3g} TFLOP; {options.loop.num_steps:,} steps, "
        f"{tokens * options.loop.num_steps:,} tokens"
    )
    return "\n".join(lines)


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _export(options: RunOptions, target: Path, model: Decoder, state: TrainState) -> None:
    """Writes what was learned, in the place of what a shorter run had left."""
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(target, ignore_errors=True)
    if options.lora is not None:
        save_adapter(target, model.config, state.whole(), options.model)
        return
    save_pretrained(target, model.config, state.whole())
    if first:
        copy_companions(resolve_source(options.tokenizer or options.model, weights=False), target)
