"""Pairs of answers: their rows, what of them is learned, their state, and what is refused."""

import json

import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.training.batch import Batch
from qwen_jax.training.data.options import DataOptions, SourceOptions, TokenOptions
from qwen_jax.training.data.pairs import PAIRS
from qwen_jax.training.data.pipeline import make_loader
from tests.training.data.conftest import random_texts, write_lines

LENGTH = 128


def records(count):
    texts = iter(random_texts(4 * count, longest=12))
    found = []
    for i in range(count):
        prompt = [{"role": "user", "content": next(texts)}]
        if i % 2:
            # An answer before, which is not learned, and rules of the house.
            prompt = [
                {"role": "system", "content": "Be kind."},
                *prompt,
                {"role": "assistant", "content": "Earlier."},
                {"role": "user", "content": "And?"},
            ]
        good, bad = ({"role": "assistant", "content": next(texts)} for _ in range(2))
        found.append({"prompt": prompt, "chosen": good, "rejected": [bad]})
    return found


@pytest.fixture
def load(tokenizer, tmp_path):
    made = []

    def make(rows, process=(0, 1), too_long=None, **options):
        # Loaders before this one have their file mapped into memory.
        folder = tmp_path / str(len(made))
        folder.mkdir()
        path = write_lines(folder / "pairs.jsonl", rows)
        options = {"length": LENGTH, "batch_size": 6, "pack": False, "epochs": 1, **options}
        sources = (SourceOptions(path, too_long=too_long),)
        loader = make_loader(DataOptions(sources, **options), tokenizer, *process, form=PAIRS)
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()


def test_a_pair_is_two_rows_of_which_the_answers_are_learned(load, tokenizer):
    rows = records(5)
    loader = load(rows, shuffle=False)
    batches = list(loader)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 2, LENGTH)] * 2
    Batch(**batches[0])
    together = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    for i, row in enumerate(rows):
        for side, answer in enumerate((row["chosen"], *row["rejected"])):
            ids = tokenizer.apply_chat_template([*row["prompt"], answer])
            n = len(ids)
            assert together["input_ids"][i, side, :n].tolist() == ids
            assert together["attention_mask"][i, side].sum() == n
            learned = together["loss_weights"][i, side] > 0
            text = tokenizer.decode(together["input_ids"][i, side][learned])
            assert text.endswith("<|im_end|>")
            assert text.removesuffix("<|im_end|>").strip() == answer["content"].strip()
    # The last batch is filled up with what is no pair.
    assert not together["attention_mask"][5].any()
    assert not together["loss_weights"][5].any()
    assert (loader.counts.records, loader.counts.truncated) == (5, 0)
    assert loader.counts.learned == together["loss_weights"].sum()


def test_the_state_goes_on_and_processes_share_the_pairs(load):
    rows = records(9)
    loader = load(rows, epochs=None, seed=4)
    first = [next(loader) for _ in range(2)]
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader) for _ in range(4)]
    again = load(rows, epochs=None, seed=4)
    again.set_state(state)
    for batch in expected:
        for name, values in next(again).items():
            np.testing.assert_array_equal(values, batch[name])
    parts = [next(load(rows, process=(i, 3), epochs=None, seed=4)) for i in range(3)]
    assert [part["input_ids"].shape for part in parts] == [(1, 2, LENGTH)] * 3
    seen = {row.tobytes() for part in parts for row in part["input_ids"]}
    assert seen == {row.tobytes() for row in first[0]["input_ids"]}


def test_answers_that_are_too_long_are_refused_or_truncated(load):
    rows = records(3)
    rows[1]["rejected"] = {"role": "assistant", "content": "long " * LENGTH}
    with pytest.raises(UserError, match=r"pairs.jsonl:2: rejected: has \d+ tokens, rows have 128"):
        list(load(rows))
    loader = load(rows, too_long="truncate")
    list(loader)
    assert (loader.counts.records, loader.counts.truncated) == (3, 1)
    rows[1]["prompt"] = [{"role": "user", "content": "long " * LENGTH}]
    with pytest.raises(UserError, match=r"pairs.jsonl:2: chosen: nothing is left of the answer"):
        list(load(rows, too_long="truncate"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack": True}, "pack = True: pairs of answers have a row for each answer"),
        ({"batch_size": 3}, "batch_size = 3 leaves a process 3 rows, and a pair takes two"),
        ({"too_long": "cut"}, "too_long = cut would tear an answer from its prompt"),
        ({"tokens": TokenOptions(learn=("user",))}, "there is no turn of user"),
    ],
)
def test_settings_that_pairs_do_not_have_are_refused(load, options, message):
    with pytest.raises(UserError, match=message):
        next(load(records(3), **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Hello"}, 'prompt = "Hello"; give messages'),
        ({"chosen": None}, "chosen is missing; give messages"),
        ({"rejected": []}, "rejected = []; give messages"),
        ({"chosen": {"role": "user", "content": "?"}}, 'chosen begins with a message of "user"'),
        ({"prompt": [{"content": "?"}]}, "prompt = .*; give messages"),
    ],
)
def test_broken_pairs_are_named_by_file_line_and_field(load, change, message):
    rows = records(2)
    rows[1] |= change
    with pytest.raises(UserError, match=f"pairs.jsonl:2: {message}".replace("[]", r"\[\]")):
        list(load(rows))
