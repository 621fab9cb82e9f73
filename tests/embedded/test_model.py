"""The model that the package brings along: what it can do, and that transformers agrees."""

import json

import numpy as np
import pytest
import torch
import transformers

import qwen_jax
from qwen_jax.checkpoint.hub import EMBEDDED, resolve_source
from qwen_jax.embedded.chats import CALCULATOR, tool_chats
from qwen_jax.embedded.problems import KINDS
from qwen_jax.embedded.tokenizer import TEMPLATE
from qwen_jax.evaluation.problems import ANSWERS, CALLS, ask, held_out_problems
from qwen_jax.inference.bulk import complete_all
from qwen_jax.inference.defaults import load_generation_defaults

NEW, EACH = 200, 12
ARITHMETIC = ("add", "subtract", "multiply")


@pytest.fixture(scope="module")
def directory():
    return resolve_source(EMBEDDED)


@pytest.fixture(scope="module")
def loaded(directory):
    return *qwen_jax.load_pretrained(EMBEDDED), qwen_jax.load_tokenizer(directory)


@pytest.fixture(scope="module")
def answers(loaded, directory):
    """Held-out problems of each kind, asked in both modes."""
    model, params, tokenizer = loaded
    stop_ids = load_generation_defaults(directory).stop_ids

    def write(prompts):
        return complete_all(
            model, params, tokenizer, prompts, NEW, stop_ids=stop_ids, batch_size=64
        )

    return ask(held_out_problems(EACH, seed=1), tokenizer, write)


def test_it_is_a_small_qwen3_in_hugging_faces_layout(directory):
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    sizes = [path.stat().st_size for path in directory.iterdir()]
    assert sum(sizes) < 6e6
    assert (directory / "chat_template.jinja").read_text() == TEMPLATE.read_text()


def test_a_directory_of_that_name_comes_before_it(tmp_path, monkeypatch):
    (tmp_path / EMBEDDED).mkdir()
    (tmp_path / EMBEDDED / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert str(resolve_source(EMBEDDED)) == EMBEDDED


def test_it_is_right_with_thinking_and_weaker_without(answers):
    """Of few problems of a kind; tools.evaluate has the figures of many."""

    def share(thinking, *kinds):
        own = [a for a in answers if (a.task, a.thinking) == (ANSWERS, thinking)]
        own = [a.right for a in own if a.kind in kinds]
        assert len(own) == EACH * len(kinds)
        return np.mean(own)

    assert share(True, *KINDS) >= 0.95
    for kind in KINDS:
        # Of twelve that are each right 9 times in 10, fewer than 8 are right once in 200 times.
        assert share(True, kind) >= 8 / 12, kind
    assert share(True, *ARITHMETIC) >= 0.9
    assert share(False, *KINDS) <= share(True, *KINDS) - 0.2
    assert share(False, *ARITHMETIC) <= 0.6


def test_it_calls_a_calculator_that_is_at_hand(answers):
    calls = [a for a in answers if a.task == CALLS]
    assert np.mean([a.right for a in calls]) >= 0.9


def test_it_says_what_a_tool_has_found(loaded, directory):
    model, params, tokenizer = loaded
    problem = next(p for p in held_out_problems(1, seed=2) if p.expression)
    messages = tool_chats(problem, True)[1]["messages"][:-1]
    prompt = tokenizer.apply_chat_template(
        messages, tools=[CALCULATOR], add_generation_prompt=True, enable_thinking=False
    )
    stop_ids = load_generation_defaults(directory).stop_ids
    (completion,) = complete_all(model, params, tokenizer, [prompt], NEW, stop_ids=stop_ids)
    assert completion.text.strip() == problem.answer


def test_transformers_says_the_same(loaded, directory):
    model, params, tokenizer = loaded
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for problem in held_out_problems(1, seed=3):
        for thinking in (True, False):
            chat = [{"role": "user", "content": problem.question}]
            text = theirs.apply_chat_template(
                chat, add_generation_prompt=True, enable_thinking=thinking, tokenize=False
            )
            prompt = theirs(text, return_tensors="pt", add_special_tokens=False)
            ours = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, enable_thinking=thinking
            )
            assert prompt["input_ids"][0].tolist() == ours
            with torch.inference_mode():
                ids = reference.generate(**prompt, max_new_tokens=NEW, do_sample=False)
            (new,) = qwen_jax.generate(model, params, [ours], max_new_tokens=NEW, temperature=0.0)
            assert ids[0, len(ours) :].tolist() == new
            assert tokenizer.decode(new) == theirs.decode(new)
