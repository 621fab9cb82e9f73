"""Order, shares and state of the batches, and what packing makes of records."""

import json
import re

import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.training.data.options import DataOptions, SourceOptions, TokenOptions
from qwen_jax.training.data.pipeline import Counts, make_loader
from qwen_jax.training.data.prepare import prepare
from qwen_jax.training.objective import Batch
from tests.training.data.conftest import chat_file, random_chats, random_texts, text_file

LENGTH = 48


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "texts": text_file(folder / "texts.jsonl", 70),
        "more": text_file(folder / "more.jsonl", 30, seed=1),
        "chats": chat_file(folder / "chats.jsonl", 40, longest=8),
    }


@pytest.fixture
def load(tokenizer, files):
    """A loader of named sources, closed at the end."""
    made = []

    def make(*names, process=(0, 1), sources=(), weights=None, too_long=None, **options):
        weights = weights or [None] * len(names)
        sources = sources or [
            SourceOptions(files[name], weight=weight, too_long=too_long)
            for name, weight in zip(names, weights, strict=True)
        ]
        options = {
            "length": LENGTH,
            "batch_size": 4,
            "threads": 2,
            "read_ahead": 9,
            "epochs": 1,
            **options,
        }
        loader = make_loader(DataOptions(tuple(sources), **options), tokenizer, *process)
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()


def segments(batches):
    """The ids of each segment of each row, without padding, and which of them are learned."""
    found = []
    for batch in batches:
        for row in zip(*(batch[k] for k in ("input_ids", "loss_weights", "segment_ids")),
                       batch["attention_mask"], strict=True):  # fmt: skip
            ids, weights, numbers, real = row
            for number in np.unique(numbers[real]):
                here = real & (numbers == number)
                found.append((tuple(ids[here].tolist()), tuple(weights[here].tolist())))
    return found


def encoded(tokenizer, texts):
    end = tokenizer.added_tokens["<|endoftext|>"]
    return [(*tokenizer.encode(text, allow_special=False), end) for text in texts]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def numbers_of(tokenizer, batches, length=LENGTH):
    """The number that each text begins with, of segments that begin one."""
    texts = [tokenizer.decode(ids) for ids, _ in segments(batches)]
    found = [re.match(r"(\d+):", text) for text in texts]
    return [int(match[1]) for match in found if match]


def test_batches_are_what_a_step_takes(load):
    (batch, *_) = load("texts")
    Batch(**batch)
    dtypes = {name: (values.shape, values.dtype.name) for name, values in batch.items()}
    shape = (4, LENGTH)
    assert dtypes == {
        "input_ids": (shape, "int32"),
        "loss_weights": (shape, "float32"),
        "attention_mask": (shape, "bool"),
        "positions": (shape, "int32"),
        "segment_ids": (shape, "int32"),
    }


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("names", [("texts",), ("chats",), ("texts", "chats")], ids=str)
def test_rows_are_in_order_for_the_model(load, names, pack):
    too_long = None if names == ("texts",) else "truncate"
    for batch in load(*names, pack=pack, too_long=too_long):
        numbers, positions, real = (
            batch[name] for name in ("segment_ids", "positions", "attention_mask")
        )
        assert (np.diff(numbers, axis=1) >= 0).all()
        assert (np.diff(real.astype(int), axis=1) <= 0).all()
        begins = real & (np.diff(numbers, axis=1, prepend=0) > 0)
        np.testing.assert_array_equal(positions == 0, begins | ~real)
        np.testing.assert_array_equal(
            (np.diff(positions, axis=1) == 1)[real[:, 1:]], ~begins[:, 1:][real[:, 1:]]
        )
        assert not batch["loss_weights"][~real | begins].any()
        assert not batch["input_ids"][~real].any()


def test_texts_are_cut_and_no_token_is_lost(load, tokenizer):
    texts = encoded(tokenizer, random_texts(70))
    assert max(map(len, texts)) > LENGTH
    loader = load("texts", shuffle=False)
    batches = list(loader)
    rows = np.concatenate([batch["input_ids"] for batch in batches])
    real = np.concatenate([batch["attention_mask"] for batch in batches])
    assert rows[real].tolist() == [i for text in texts for i in text]
    # All rows but the last that has any token are full.
    assert real.all(1).sum() == sum(map(len, texts)) // LENGTH
    assert loader.counts == Counts(
        records=70,
        truncated=0,
        tokens=sum(map(len, texts)),
        learned=sum(map(len, texts)) - len(segments(batches)),
        padding=rows.size - sum(map(len, texts)),
    )
    np.testing.assert_allclose(loader.counts.padding_share, 1 - real.mean())


def test_counts_are_told_in_a_line():
    counts = Counts(records=70, truncated=3, tokens=900, learned=250, padding=100)
    told = "70 records, 3 of them truncated; 250 of 900 tokens learned; 10.0% padding"
    assert str(counts) == told
    assert str(Counts()).endswith("0 of 0 tokens learned; 0.0% padding")


@pytest.mark.parametrize("pack", [True, False])
def test_chats_stay_whole_and_are_learned_as_they_are(load, tokenizer, pack):
    loader = load("chats", pack=pack, length=96)
    found = segments(loader)
    expected = {
        tuple(tokenizer.apply_chat_template(chat, allow_special=False)): chat
        for chat in random_chats(40, longest=8)
    }
    assert sorted(ids for ids, _ in found) == sorted(expected)
    for ids, weights in found:
        chat = expected[ids]
        learned = tokenizer.decode(np.array(ids)[np.array(weights) > 0])
        assert learned.count("<|im_end|>") == len(chat) // 2
        assert learned.endswith(chat[-1]["content"] + "<|im_end|>")
        assert chat[0]["content"] not in learned.replace(chat[1]["content"], "")
    assert loader.counts.records == 40
    if pack:
        assert loader.counts.padding_share < 0.35


def test_best_fit_leaves_less_padding_than_a_row_each(load):
    shares = {}
    for pack in (True, False):
        loader = load("chats", pack=pack, length=160)
        list(loader)
        shares[pack] = loader.counts.padding_share
    assert shares[True] < 0.6 * shares[False]


def test_long_records_are_truncated_cut_or_refused_as_told(load, tokenizer):
    texts = encoded(tokenizer, random_texts(70))
    long = sum(len(text) > LENGTH for text in texts)
    for pack in (True, False):
        loader = load("texts", pack=pack, too_long="truncate")
        assert sorted(ids for ids, _ in segments(loader)) == sorted(t[:LENGTH] for t in texts)
        assert loader.counts.truncated == long > 0
        assert loader.counts.records == 70
    loader = load("texts", pack=False, too_long="cut")
    pieces = [text[i : i + LENGTH] for text in texts for i in range(0, len(text), LENGTH)]
    assert sorted(ids for ids, _ in segments(loader)) == sorted(pieces)
    assert loader.counts.records == 70
    assert loader.counts.truncated == 0
    with pytest.raises(
        UserError, match=r"texts\.jsonl:\d+: has \d+ tokens, rows have 48; raise le"
    ):
        list(load("texts", too_long="refuse"))


def test_chats_longer_than_a_row_are_refused_unless_told(load):
    with pytest.raises(UserError, match=r"chats\.jsonl:\d+: has \d+ tokens, rows have 32"):
        list(load("chats", length=32))


def test_cut_texts_among_whole_chats_lose_nothing(load, tokenizer, files):
    sources = [SourceOptions(files["texts"]), SourceOptions(files["chats"], too_long="truncate")]
    loader = load(sources=sources, length=40)
    found = [ids for ids, _ in segments(loader)]
    for text in encoded(tokenizer, random_texts(70)):
        for i in range(0, len(text), 40):
            found.remove(text[i : i + 40])
    assert len(found) == 40


def test_the_order_is_the_seeds_whatever_the_threads(load):
    batches = list(load("texts", threads=0, epochs=2))
    for threads in (1, 7):
        for a, b in zip(batches, load("texts", threads=threads, epochs=2), strict=True):
            same(a, b)
    other = list(load("texts", seed=5, epochs=2))
    assert any((a["input_ids"] != b["input_ids"]).any() for a, b in zip(batches, other))  # noqa: B905


def test_each_epoch_has_every_record_once_in_an_order_of_its_own(load, tokenizer):
    loader = load("texts", pack=False, too_long="truncate", epochs=3, batch_size=1)
    numbers = numbers_of(tokenizer, loader)
    epochs = [numbers[i : i + 70] for i in (0, 70, 140)]
    assert len(numbers) == 210
    for epoch in epochs:
        assert sorted(epoch) == list(range(70))
        assert epoch != sorted(epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    loader = load("texts", pack=False, too_long="truncate", shuffle=False, batch_size=1)
    assert numbers_of(tokenizer, loader) == list(range(70))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_records_out(load, tokenizer, processes):
    shares = []
    for process in range(processes):
        loader = load("texts", process=(process, processes), batch_size=6, epochs=2)
        batches = list(loader)
        assert all(batch["input_ids"].shape == (6 // processes, LENGTH) for batch in batches)
        numbers = [int(m) for ids, _ in segments(batches)
                   for m in re.findall(r"^(\d+):", tokenizer.decode(ids))]  # fmt: skip
        shares.append((numbers, loader.counts.records))
    assert sum(count for _, count in shares) == 140

    loaders = [
        load("texts", process=(i, processes), batch_size=6, pack=False, too_long="truncate")
        for i in range(processes)
    ]
    found = [set(numbers_of(tokenizer, loader)) for loader in loaders]
    assert sum(map(len, found)) == 70
    assert set.union(*found) == set(range(70))


def test_unweighted_sources_are_shuffled_together(load, tokenizer):
    loader = load("texts", "more", pack=False, too_long="truncate", batch_size=1)
    texts = encoded(tokenizer, random_texts(70) + random_texts(30, seed=1))
    found = [ids for ids, _ in segments(loader)]
    assert sorted(found) == sorted(text[:LENGTH] for text in texts)
    first = {text[:LENGTH] for text in texts[:70]}
    inside = [ids in first for ids in found]
    assert 8 < sum(inside[:20]) < 20


@pytest.mark.parametrize("pack", [True, False])
def test_weights_are_shares_of_the_rows(load, tokenizer, pack):
    loader = load("texts", "chats", weights=[1, 3], epochs=None, pack=pack, too_long="truncate")
    rows = [next(loader) for _ in range(30)]
    opening = tokenizer.added_tokens["<|im_start|>"]
    chats = np.concatenate([(batch["input_ids"] == opening).any(1) for batch in rows])
    assert chats.mean() == 0.75
    np.testing.assert_array_equal(np.concatenate([batch["domains"] for batch in rows]), chats)
    # All along, not only in the end.
    for part in np.split(chats, 6):
        assert abs(part.mean() - 0.75) <= 0.05


STATES = {
    "cut": (("texts",), {}),
    "whole": (("chats",), {"length": 96, "packing_rows": 5}),
    "both": (("texts", "chats"), {"too_long": "truncate", "packing_rows": 6}),
    "unpacked": (("texts",), {"pack": False}),
    "mixture": (("texts", "chats", "more"), {"weights": [2, 1, 0.5], "length": 96, "epochs": None}),
    "mixture unpacked": (
        ("texts", "chats"),
        {"weights": [2, 1], "pack": False, "too_long": "truncate", "epochs": None},
    ),
    "no threads": (("texts",), {"threads": 0}),
    "long texts": (("texts",), {"length": 7, "epochs": 2}),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_went_through_json_goes_on_exactly(load, case):
    names, options = STATES[case]
    options = {"epochs": 2, **options}
    loader = load(*names, **options)
    states, batches, counts = [], [], []
    for _ in range(25):
        states.append(json.dumps(loader.get_state()))
        counts.append(loader.counts)
        batch = next(loader, None)
        if batch is None:
            break
        batches.append(batch)
    assert len(batches) > 5
    steps = range(len(states)) if len(states) < 12 else [0, 1, 2, 3, 5, 8, 13, len(states) - 1]
    steps = [step for step in steps if step < len(states)]
    used = load(*names, **options)
    for step in reversed(steps):
        for fresh in (load(*names, **options), used):
            fresh.set_state(json.loads(states[step]))
            assert fresh.counts == counts[step]
            assert json.dumps(fresh.get_state()) == states[step]
            for number in range(step, min(step + 4, len(batches))):
                same(next(fresh), batches[number])
            if step + 4 > len(batches) and len(batches) < 25:
                assert next(fresh, None) is None


def test_prepared_data_gives_the_same_batches(
    load, tokenizer, tokenizer_directory, files, tmp_path
):
    for name in ("texts", "chats"):
        source = SourceOptions(files[name])
        prepare(tmp_path / name, tokenizer_directory, source, TokenOptions(), records_a_part=16)
        options = {"length": 96, "epochs": 2}
        prepared = load(sources=[SourceOptions(str(tmp_path / name))], **options)
        for a, b in zip(prepared, load(name, **options), strict=True):
            same(a, b)


def test_an_error_of_a_record_names_it_where_it_is_read(load, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": 3}\n')
    loader = load(sources=[SourceOptions(str(path))])
    # Grain adds notes about itself, which are not part of the line.
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value) == f"{path}:2: text = 3 should be a string"


def test_what_cannot_be_shared_out_is_refused(load, tokenizer, files):
    with pytest.raises(UserError, match="batch_size = 4 is not a multiple of the 3 processes"):
        load("texts", process=(0, 3))
    with pytest.raises(UserError, match="70 records are fewer than the 80 processes"):
        load("texts", process=(0, 80), batch_size=80)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources is empty; name at least one"),
        ({"length": 1}, "length = 1 must be at least 2"),
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"threads": -1}, "threads = -1 must be at least 0"),
        ({"seed": -1}, r"seed = -1 must be at least 0 and below 4294967296"),
        ({"epochs": 0}, "epochs = 0 must be at least 1"),
        (
            {"sources": (SourceOptions("a", weight=1.0),), "epochs": 1},
            "epochs = 1 with weights: sources end at different times",
        ),
        (
            {"sources": (SourceOptions("a", weight=1.0), SourceOptions("b"))},
            "b: has no weight, other sources have; give all or none one",
        ),
    ],
)
def test_options_that_are_none_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DataOptions(**{"sources": (SourceOptions("a"),), **changes})


def test_options_of_sources_and_tokens_that_are_none_are_refused():
    for changes, message in (
        ({"path": ""}, "path of a source is empty"),
        ({"weight": 0.0}, "a: weight = 0.0 must be positive"),
        ({"weight": float("nan")}, "a: weight = nan must be positive"),
        ({"too_long": "drop"}, "a: too_long = drop is not supported; known: cut, truncate, refuse"),
    ):
        with pytest.raises(UserError, match=message):
            SourceOptions(**{"path": "a", **changes})
    for learn in (("asistant",), ()):
        with pytest.raises(UserError, match="known roles: system, user, assistant, tool"):
            TokenOptions(learn=learn)
