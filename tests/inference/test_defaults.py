"""generation_config.json against transformers' reading of the same file."""

import json
from types import SimpleNamespace

import pytest
import transformers

from qwen_jax import UserError
from qwen_jax.inference.defaults import (
    GenerationDefaults,
    load_generation_defaults,
    stop_ids_of,
)
from qwen_jax.inference.sampling import SamplingOptions
from tests.reference import random_reference

IDS = {"bos_token_id": 151643, "pad_token_id": 151643}

# The fields of the published files, values included.
PUBLISHED = {
    "Qwen-7B-Chat": {
        "chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643,
        "max_window_size": 6144, "max_new_tokens": 512, "do_sample": True, "top_k": 0,
        "top_p": 0.8, "repetition_penalty": 1.1, "transformers_version": "4.31.0",
    },
    "Qwen-7B": {
        "chat_format": "raw", "do_sample": True, "eos_token_id": 151643, "max_new_tokens": 512,
        "pad_token_id": 151643, "stop_words_ids": [[151643]], "top_k": 0, "top_p": 0.8,
        "transformers_version": "4.31.0",
    },
    "Qwen1.5-7B": {
        "bos_token_id": 151643, "eos_token_id": 151643, "max_new_tokens": 2048,
        "transformers_version": "4.37.0",
    },
    "Qwen1.5-7B-Chat": {
        **IDS, "do_sample": True, "eos_token_id": [151645, 151643], "repetition_penalty": 1.05,
        "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0",
    },
    "Qwen2.5-7B": {
        "bos_token_id": 151643, "do_sample": False, "eos_token_id": 151643,
        "max_new_tokens": 2048, "transformers_version": "4.37.0",
    },
    "Qwen2.5-7B-Instruct": {
        **IDS, "do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8,
        "top_k": 20, "eos_token_id": [151645, 151643], "transformers_version": "4.37.0",
    },
    "Qwen3-8B": {
        **IDS, "do_sample": True, "eos_token_id": [151645, 151643], "temperature": 0.6,
        "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0",
    },
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def read_(values):
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
        return load_generation_defaults(tmp_path)

    return read_


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_honoured(read, name):
    values = PUBLISHED[name]
    defaults = read(values)
    eos = values["eos_token_id"]
    assert defaults.stop_ids == (tuple(eos) if isinstance(eos, list) else (eos,))
    assert defaults.max_new_tokens == values.get("max_new_tokens")
    assert defaults.options.greedy == (not values.get("do_sample", False))
    chatml = values.get("chat_format") == "chatml"
    assert defaults.stop_tokens == (("<|im_end|>", "<|im_start|>") if chatml else ())
    assert defaults.max_window_size == values.get("max_window_size")
    for field in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if field in values:
            assert getattr(defaults.options, field) == values[field]


@pytest.fixture(scope="module")
def reference():
    return random_reference("qwen2", num_hidden_layers=1)


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": None, "temperature": None, "top_p": None},
        {"do_sample": True, "top_k": 0, "min_p": 0.1},
        {"do_sample": True, "temperature": 0.3, "repetition_penalty": 1.2},
        {"do_sample": False, "repetition_penalty": 1.2},
        {"repetition_penalty": 1.2},
        {},
        *PUBLISHED.values(),
    ],
    ids=str,
)
def test_what_a_file_leaves_out_means_what_it_means_to_the_reference(
    read, reference, tmp_path, values
):
    options = read(values).options
    reference.generation_config = transformers.GenerationConfig.from_pretrained(tmp_path)
    expected, _ = reference._prepare_generation_config(None)
    assert options.greedy != expected.do_sample
    assert options.repetition_penalty == (expected.repetition_penalty or 1.0)
    if expected.do_sample:
        assert options.temperature == expected.temperature
        assert options.top_k == expected.top_k
        assert options.top_p == expected.top_p
        assert options.min_p == (expected.min_p or 0.0)


def test_a_file_that_the_reference_saves_is_accepted(read, tmp_path):
    transformers.GenerationConfig(do_sample=True, temperature=0.6, top_k=20).save_pretrained(
        tmp_path
    )
    options = load_generation_defaults(tmp_path).options
    assert (options.temperature, options.top_k) == (0.6, 20)
    every_field = transformers.GenerationConfig(do_sample=True).to_dict()
    assert read(every_field).options == SamplingOptions(1.0, 50)


def test_greedy_when_the_file_is_absent(tmp_path):
    assert load_generation_defaults(tmp_path) == GenerationDefaults(SamplingOptions(), None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 4}, "num_beams = 4 is not supported"),
        ({"chat_format": "alpaca"}, 'chat_format = "alpaca" is not supported: known: chatml, raw'),
        ({"stop_words_ids": [[25, 13]]}, "stop_words_ids = [25, 13] is not supported"),
        ({"stop_words_ids": [25]}, "stop_words_ids = [25] should be a list of lists of integers"),
        ({"penalty_alpha": 0.6}, "penalty_alpha = 0.6 is not supported"),
        ({"typical_p": 0.9}, "typical_p = 0.9 is not supported"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size = 3 is not supported"),
        ({"bad_words_ids": [[5]]}, "bad_words_ids = [[5]] is not supported"),
        ({"invented": "x"}, 'invented = "x" is not supported'),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is not supported"),
        ({"temperature": "hot"}, 'temperature = "hot" should be a number'),
        ({"do_sample": 1}, "do_sample = 1 should be a boolean"),
        ({"eos_token_id": "x"}, 'eos_token_id = "x" should be an integer or list of integers'),
        ({"do_sample": True, "top_p": 1.5}, "top_p = 1.5 should be a number above 0"),
        ({"do_sample": True, "top_k": -1}, "top_k = -1 should be an integer, 0 for off"),
        ([], "should hold a JSON object, holds a list"),
        ('{"top_k": ', "not valid JSON"),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_refused_by_name_and_value(read, tmp_path, values, message):
    with pytest.raises(UserError) as refusal:
        read(values)
    assert str(refusal.value).startswith(f"{tmp_path / 'generation_config.json'}: {message}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "config_ids", "tokenizer_id", "expected"),
    [
        # The file alone counts where it names ids.
        ({"eos_token_id": [3, 5]}, (7,), 9, (3, 5)),
        ({"eos_token_id": 3, "stop_words_ids": [[5], [3]]}, (7,), 9, (3, 5)),
        ({}, (7, 8), 9, (7, 8, 9)),
        ({"top_k": 4}, (7, 9), 9, (7, 9)),
        ({}, (7,), None, (7,)),
        ({}, (), None, ()),
        ({"eos_token_id": 3, "chat_format": "chatml"}, (7,), 9, (3, 11, 12)),
        ({"chat_format": "chatml"}, (), 11, (11, 12)),
    ],
)
def test_what_ends_a_text(read, values, config_ids, tokenizer_id, expected):
    config = SimpleNamespace(eos_token_ids=config_ids)
    added = {"<|im_start|>": 12, "<|im_end|>": 11, "<|other|>": 13}
    tokenizer = SimpleNamespace(eos_token_id=tokenizer_id, added_tokens=added)
    assert stop_ids_of(read(values), config, tokenizer) == expected


def test_filters_of_a_greedy_file_hold_for_whoever_asks_for_a_temperature(read):
    options = read({"do_sample": False, "top_k": 3, "top_p": 0.5, "presence_penalty": 1.5}).options
    assert options == SamplingOptions(0.0, 3, 0.5, presence_penalty=1.5)
