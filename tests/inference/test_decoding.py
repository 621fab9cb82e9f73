"""Greedy ids against transformers' `generate`; what a stream promises about caches and programs."""

import warnings

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qwen_jax
from qwen_jax import UserError
from qwen_jax.inference import decoding
from qwen_jax.inference.decoding import TokenStream, bucket
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.models import decoder
from qwen_jax.nn.cache import init_cache
from tests.reference import forget_lengths, random_reference, save_reference

NEW = 64
SAMPLED = SamplingOptions(temperature=1.0, top_k=40, presence_penalty=0.3)

CASES = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 sliding": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 10,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "linear": ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "yarn": (
        "qwen3",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "dynamic": (
        "qwen2",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.5}, "max_position_embeddings": 32},
    ),
}


def load(tmp_path_factory, family, **fields):
    reference = random_reference(family, seed=11, **fields)
    directory = save_reference(reference, tmp_path_factory.mktemp("model"))
    return reference, *qwen_jax.load_pretrained(directory)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load(tmp_path_factory, "qwen3", eos_token_id=[317, 318], num_hidden_layers=2)


def random_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 300, length).tolist() for length in lengths]


def reference_generate(reference, prompts, **options):
    """transformers' new ids of each row, after left padding."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    forget_lengths(reference)
    out = reference.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        pad_token_id=0,
        **{"max_new_tokens": NEW, "eos_token_id": None, **options},
    )
    return out[:, longest:].tolist()


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_greedy_ids_of_a_ragged_batch_equal_the_reference(name, tmp_path_factory):
    family, fields = CASES[name]
    reference, model, params = load(tmp_path_factory, family, **fields)
    prompts = random_prompts([21, 6, 13])
    expected = reference_generate(reference, prompts, use_cache=name != "dynamic")
    found = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    assert found == expected
    assert len({token for row in found for token in row}) > 5


@pytest.mark.parametrize("factor", [1.3, 0.8])
def test_repetition_penalty_equals_the_reference(small, factor):
    reference, model, params = small
    prompts = random_prompts([19])
    expected = reference_generate(reference, prompts, repetition_penalty=factor)
    found = qwen_jax.generate(model, params, prompts, NEW, repetition_penalty=factor, stop_ids=[])
    assert found == expected
    assert found != qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])


def test_rows_end_where_the_reference_ends_them(small):
    reference, model, params = small
    prompts = random_prompts([9, 14, 3])
    free = qwen_jax.generate(model, params, prompts, 40, stop_ids=[])
    stop_ids = [free[0][7], free[1][20]]
    ends = [next((i for i, token in enumerate(row) if token in stop_ids), 39) for row in free]
    found = qwen_jax.generate(model, params, prompts, 40, stop_ids=stop_ids)
    assert found == [row[: end + 1] for row, end in zip(free, ends, strict=True)]
    assert found[0][-1] in stop_ids
    assert found[1][-1] in stop_ids
    expected = reference_generate(reference, prompts, max_new_tokens=40, eos_token_id=stop_ids)
    for row, theirs in zip(found, expected, strict=True):
        assert theirs[: len(row)] == row
        assert not any(theirs[len(row) :])


def test_without_stop_ids_the_config_says_where_a_text_ends(small, tmp_path_factory):
    _, model, params = small
    assert TokenStream(model, params, [[1]], 1)._stop_ids == {317, 318}
    prompts = random_prompts([9])
    eos = qwen_jax.generate(model, params, prompts, 20, stop_ids=[])[0][5]
    _, model, params = load(tmp_path_factory, "qwen3", eos_token_id=eos, num_hidden_layers=2)
    (row,) = qwen_jax.generate(model, params, prompts, 20)
    assert len(row) <= 6
    assert row[-1] == eos


def test_a_stopped_row_gives_none_and_the_others_go_on(small):
    _, model, params = small
    prompts = random_prompts([5, 8])
    free = qwen_jax.generate(model, params, prompts, 6, stop_ids=[])
    stream = TokenStream(model, params, prompts, 6, stop_ids=[])
    steps = []
    for step in stream:
        steps.append(step)
        if len(steps) == 2:
            stream.stop(0)
    assert [step[0] for step in steps] == [*free[0][:2], None, None, None, None]
    assert [step[1] for step in steps] == free[1]


def test_a_cache_that_grows_gives_what_a_large_one_gives(small, monkeypatch):
    _, model, params = small
    prompts = random_prompts([7, 4])
    monkeypatch.setattr(decoding, "_FIRST_ROOM", 8)
    stream = TokenStream(model, params, prompts, 80, SAMPLED, [], seed=3)
    capacities, grown = [], []
    for step in stream:
        grown.append(step)
        capacities.append(stream.cache.capacity)
    assert len(set(capacities)) >= 4
    large = init_cache(model.config, 2, 512, np.float32)
    kept = list(TokenStream(model, params, prompts, 80, SAMPLED, [], 3, large))
    assert grown == kept
    assert grown == list(TokenStream(model, params, prompts, 80, SAMPLED, [], seed=3))


def test_a_high_limit_costs_no_memory_before_the_text_is_long(small):
    _, model, params = small
    stream = TokenStream(model, params, random_prompts([7]), 10**9)
    for _ in range(3):
        next(stream)
    assert stream.cache.capacity <= 2 * decoding._FIRST_ROOM


def test_a_step_updates_the_cache_in_place(small):
    _, model, params = small
    stream = TokenStream(model, params, random_prompts([7]), 10, stop_ids=[])
    next(stream), next(stream)
    before = stream.cache
    address = before.layers[0].keys.unsafe_buffer_pointer()
    next(stream)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.layers))
    assert stream.cache.layers[0].keys.unsafe_buffer_pointer() == address


def test_a_stream_goes_on_from_the_cache_of_another(small):
    """The second part of a text run on the cache of the first, penalties of both included."""
    _, model, params = small
    options = SamplingOptions(repetition_penalty=1.5)
    (prompt,) = random_prompts([24])
    whole = qwen_jax.generate(model, params, [prompt], 10, repetition_penalty=1.5, stop_ids=[])
    first = TokenStream(model, params, [prompt[:15]], 1, options)
    next(first)
    rest = TokenStream(model, params, [prompt[15:]], 10, options, [], cache=first.cache)
    assert [token for (token,) in rest] == whole[0]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(small):
    _, model, params = small
    prompts = random_prompts([5, 5])

    def sample(seed):
        return qwen_jax.generate(model, params, prompts, 12, 1.0, seed=seed, stop_ids=[])

    assert sample(4) == sample(4)
    assert sample(4) != sample(5)
    same_prompt = qwen_jax.generate(model, params, [[1, 2]] * 2, 12, 1.0, stop_ids=[])
    assert same_prompt[0] != same_prompt[1]


def test_the_draws_of_a_row_do_not_depend_on_its_batch(small):
    _, model, params = small
    prompts = random_prompts([9, 5, 12, 7])
    together = list(zip(*TokenStream(model, params, prompts, 12, SAMPLED, [], 7), strict=True))
    others = [prompts[0], *random_prompts([8, 4, 3], seed=9)]
    assert (
        next(zip(*TokenStream(model, params, others, 12, SAMPLED, [], 7), strict=True))
        == (together[0])
    )
    for start in (0, 2):
        stream = TokenStream(
            model, params, prompts[start : start + 2], 12, SAMPLED, [], 7, first_row=start
        )
        assert list(zip(*stream, strict=True)) == together[start : start + 2]


@given(st.integers(1, 10**9))
def test_a_bucket_holds_its_length_with_at_most_a_quarter_of_padding(n):
    assert bucket(n) >= n
    assert bucket(n) == 16 or bucket(n) - n <= bucket(n) / 4
    assert bucket(bucket(n)) == bucket(n)
    assert bucket(n) <= bucket(n + 1)


def test_there_are_few_buckets():
    assert len({bucket(n) for n in range(1, 2**15)}) <= 4 * 12


def test_many_lengths_run_few_programs(small):
    _, model, params = small
    prefills, steps = decoding.prefill._cache_size(), decoding.decode_step("cpu")._cache_size()
    for length in range(1, 41):
        qwen_jax.generate(model, params, random_prompts([length]), 3, stop_ids=[])
    buckets = {bucket(length) for length in range(1, 41)}
    assert decoding.prefill._cache_size() - prefills <= len(buckets)
    assert decoding.decode_step("cpu")._cache_size() - steps <= len(buckets) + 1


def test_parameters_may_lie_on_the_host(small):
    _, model, params = small
    prompts = random_prompts([5, 9])
    ours = qwen_jax.generate(model, params, prompts, 4, stop_ids=[])
    assert qwen_jax.generate(model, jax.device_get(params), prompts, 4, stop_ids=[]) == ours


def test_a_short_prompt_compiles_one_decode_step(small):
    """The cache of the prompt alone would be full, and a program wasted, after a few tokens."""
    _, model, params = small
    options = SamplingOptions(repetition_penalty=1.01)
    before = decoding.decode_step("cpu")._cache_size()
    list(TokenStream(model, params, random_prompts([30]), 100, options, []))
    assert decoding.decode_step("cpu")._cache_size() - before == 1


def test_the_warning_about_positions_comes_once(tmp_path_factory):
    _, model, params = load(tmp_path_factory, "qwen3", max_position_embeddings=20)
    decoder._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qwen_jax.generate(model, params, random_prompts([17]), 4, stop_ids=[])
        assert not [warning for warning in caught if warning.category is UserWarning]
        qwen_jax.generate(model, params, random_prompts([17]), 6, stop_ids=[])
        qwen_jax.generate(model, params, random_prompts([25]), 6, stop_ids=[])
    # What earlier tests have left behind may be collected, and warned of, in between.
    caught = [warning for warning in caught if warning.category is UserWarning]
    assert [str(warning.message) for warning in caught] == [
        "the text is longer than the model's 20 positions (max_position_embeddings) and RoPE is "
        "not scaled: expect the output to degrade"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 320]]}, "prompt 0: token id 320 is outside"),
        ({"prompts": [[1, -7]]}, "prompt 0: token id -7 is outside"),
        ({"prompts": [[1.0, 2.0]]}, "prompt 0 should be a list of token ids"),
        ({"prompts": [[[1, 2]]]}, "prompt 0 should be a list of token ids"),
        ({"prompts": [[[1], [2, 3]]]}, "prompt 0 should be a list of token ids"),
        ({"prompts": [1, 2]}, "prompt 0 should be a list of token ids"),
        ({"prompts": "hi"}, "prompt 0 should be a list of token ids"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"temperature": -1}, "temperature = -1"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.replace(" ", "-"),
)
def test_bad_input_is_refused(small, arguments, message):
    _, model, params = small
    with pytest.raises(UserError) as refusal:
        qwen_jax.generate(model, params, **{"prompts": [[1, 2]], **arguments})
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_no_prompts_give_no_texts(small):
    _, model, params = small
    assert qwen_jax.generate(model, params, []) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(small, temperature):
    _, model, params = small
    broken = jax.tree.map(lambda x: x, params)
    broken["norm"]["weight"] = np.full_like(params["norm"]["weight"], np.nan)
    with pytest.raises(UserError, match="the logits of new token 1 are NaN"):
        qwen_jax.generate(model, broken, [[1, 2]], temperature=temperature)


def test_other_temperatures_compile_nothing(small):
    _, model, params = small
    counts = []
    for temperature, top_p, seed in ((0.5, 0.9, 0), (0.9, 0.3, 5)):
        qwen_jax.generate(
            model, params, [[1, 2, 3]], 4, temperature, top_k=5, top_p=top_p, seed=seed
        )
        counts.append((decoding.prefill._cache_size(), decoding.decode_step("cpu")._cache_size()))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("options", [SamplingOptions(repetition_penalty=1.4), SAMPLED])
def test_forced_tokens_of_a_row_are_like_its_own(small, options):
    """What follows them is what follows a prompt that holds them; the other rows do not notice."""
    _, model, params = small
    prompts = random_prompts([9, 5, 7])
    free = list(zip(*TokenStream(model, params, prompts, 20, options, [], 3), strict=True))
    forced = {0: (4, [11, 12, 13]), 2: (9, [311])}
    stream = TokenStream(model, params, prompts, 20, options, [], 3)
    steps = []
    for step in stream:
        steps.append(step)
        for row, (start, ids) in forced.items():
            if len(steps) == start:
                stream.force(row, ids)
    found = list(zip(*steps, strict=True))
    assert found[1] == free[1]
    for row, (start, ids) in forced.items():
        end = start + len(ids)
        assert found[row][:start] == free[row][:start]
        assert list(found[row][start:end]) == ids != list(free[row][start:end])
        assert found[row][end:] != free[row][end:]
        # One token at a time by forcing everything that came: the same cache, counts and draws.
        again = TokenStream(model, params, prompts, 20, options, [], 3)
        again.force(row, found[row][:end])
        assert list(zip(*again, strict=True))[row] == found[row]


def test_greedy_tokens_after_forced_ones_are_the_reference_s(small):
    reference, model, params = small
    (prompt,) = random_prompts([12])
    stream = TokenStream(model, params, [prompt], 30, stop_ids=[])
    stream.force(0, [7, 8, 9])
    tokens = [token for (token,) in stream]
    assert tokens[:3] == [7, 8, 9]
    expected = reference_generate(reference, [[*prompt, 7, 8, 9]], max_new_tokens=27)
    assert tokens[3:] == expected[0]


def test_a_forced_stop_id_ends_its_row_and_a_wrong_id_is_refused(small):
    _, model, params = small
    stream = TokenStream(model, params, random_prompts([5, 8]), 4, stop_ids=[3])
    with pytest.raises(UserError, match="token id 320 is outside"):
        stream.force(0, [320])
    stream.force(0, [2, 3, 4])
    steps = list(stream)
    assert [step[0] for step in steps] == [2, 3, None, None]
    assert steps[-1][1] is not None


def test_forced_tokens_do_not_hide_logits_that_are_not_numbers(small):
    _, model, params = small
    broken = jax.tree.map(lambda x: x, params)
    broken["norm"]["weight"] = np.full_like(params["norm"]["weight"], np.nan)
    stream = TokenStream(model, broken, [[1, 2]], 4)
    stream.force(0, [5])
    with pytest.raises(UserError, match="the logits of new token 1 are NaN"):
        next(stream)
