"""Adapters on the command lines: several served by name, one merged into a checkpoint."""

import json

import jax
import numpy as np
import peft
import pytest
import torch

import qwen_jax
from qwen_jax.checkpoint.peft_reader import load_adapter
from qwen_jax.nn.low_rank import attach
from tests.reference import random_reference
from tests.tools.conftest import refusal

PROMPTS = ["The sea", "A mesh of", "Then he", "Why"]
GREEDY = ("--temperature=0", "--max_new_tokens=6", "--top_k=0", "--output=json")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two of PEFT's, of one shape and with other scales, for the model of `checkpoint`."""
    found = {}
    for number, name in enumerate(("sea", "city")):
        torch.manual_seed(number)
        reference = random_reference("qwen3", num_hidden_layers=2, max_position_embeddings=300)
        config = peft.LoraConfig(
            r=2,
            lora_alpha=3 + number,
            target_modules=["q_proj", "up_proj"],
            init_lora_weights=False,
        )
        adapted = peft.get_peft_model(reference, config)
        with torch.no_grad():
            torch.manual_seed(number)
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        found[name] = tmp_path_factory.mktemp(name)
        adapted.save_pretrained(found[name])
    return found


def flags(adapters):
    return [f"--adapter={name}={directory}" for name, directory in adapters.items()]


def test_rows_are_written_each_with_its_adapter_in_one_run(
    checkpoint, adapters, run_tool, tmp_path
):
    rows = [
        {"prompt": PROMPTS[0], "adapter": "city"},
        {"prompt": PROMPTS[1]},
        {"prompt": PROMPTS[2], "adapter": None},
        {"prompt": PROMPTS[3], "adapter": "city"},
        {"prompt": PROMPTS[0]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    done = run_tool(
        "generate",
        f"--model={checkpoint}",
        f"--input={path}",
        *flags(adapters),
        "--use_adapter=sea",
        *GREEDY,
    )
    assert (done.returncode, done.stderr) == (0, "")
    written = [json.loads(line) for line in done.stdout.splitlines()]
    model, params = qwen_jax.load_pretrained(checkpoint)
    tokenizer = qwen_jax.load_tokenizer(checkpoint)
    seen = set()
    for row, record in zip(rows, written, strict=True):
        name = row.get("adapter", "sea")
        own = params
        if name is not None:
            own = attach(params, load_adapter(adapters[name], model.config))
        ids = tokenizer.encode(row["prompt"], allow_special=False)
        stop_ids = [tokenizer.added_tokens["<|im_end|>"]]
        (expected,) = qwen_jax.generate(model, own, [ids], 6, stop_ids=stop_ids)
        assert record["token_ids"] == expected
        assert row.items() <= record.items()
        seen.add(tuple(expected))
    # Not the same whatever the adapter.
    assert len(seen) > 3


def test_draws_of_a_row_do_not_depend_on_the_adapters_of_others(
    checkpoint, adapters, run_tool, tmp_path
):
    path = tmp_path / "rows.jsonl"
    texts = []
    for others in (None, "city"):
        rows = [{"prompt": text, "adapter": others} for text in PROMPTS[:2]]
        rows.append({"prompt": PROMPTS[2]})
        path.write_text("\n".join(map(json.dumps, rows)))
        done = run_tool(
            "generate", f"--model={checkpoint}", f"--input={path}", *flags(adapters), "--seed=3"
        )
        assert done.returncode == 0
        texts.append(done.stdout.partition("--- 3 of 3")[2])
    assert texts[0]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter=sea",), "--adapter=sea: should be NAME=DIR"),
        (("{sea}", "{sea}"), "the name sea is given twice"),
        (("--use_adapter=sea",), "--use_adapter = sea is not the name of an --adapter; there is"),
        (("{sea}", "--use_adapter=see"), "--use_adapter = see is not the name of an --adapter; th"),
        (("--adapter=sea=nowhere",), "nowhere: no such directory; give that of an adapter"),
        (("{sea}", "--input={rows}"), "rows.jsonl:1: adapter = lake is not the name of an --adap"),
    ],
)
def test_bad_names_are_refused_in_one_line(
    checkpoint, adapters, run_tool, tmp_path, arguments, message
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "x", "adapter": "lake"}))
    own = {"sea": f"--adapter=sea={adapters['sea']}", "rows": rows}
    arguments = [argument.format(**own) for argument in arguments]
    if not any(argument.startswith("--input") for argument in arguments):
        arguments.append("--prompt=x")
    assert message in refusal(run_tool("generate", f"--model={checkpoint}", *arguments))


def test_a_merged_checkpoint_writes_as_the_model_with_its_adapter(
    checkpoint, adapters, run_tool, tmp_path
):
    target = tmp_path / "merged"
    arguments = (f"--source={checkpoint}", f"--target={target}", "--format=hf")
    done = run_tool("convert", *arguments, f"--adapter={adapters['sea']}")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{adapters['sea']} merged" in done.stdout
    model, params = qwen_jax.load_pretrained(checkpoint)
    again, merged = qwen_jax.load_pretrained(target)
    own = attach(params, load_adapter(adapters["sea"], model.config))
    ids = np.arange(9)[None]
    expected = jax.jit(model.apply)({"params": own}, ids).logits
    np.testing.assert_allclose(again.apply({"params": merged}, ids).logits, expected, atol=1e-4)
