"""`--workload=throughput`: that its engines write the same, and what it makes of their times."""

import json

import numpy as np
import pytest

from qwen_jax.benchmark import throughput
from qwen_jax.benchmark.batching import WRITERS, ManyTexts, batches, write_all
from qwen_jax.benchmark.compiling import length_of_union
from qwen_jax.benchmark.throughput import (
    WAYS,
    Pass,
    best_sizes,
    new_passes,
    read_passes,
    throughput_tables,
)
from qwen_jax.errors import UserError
from tests.benchmark.test_benchmark import cells
from tests.reference import random_reference, save_reference
from tests.tools.conftest import refusal

COUNT = 5


def texts_of(directory):
    return ManyTexts(str(directory), 320, COUNT, (3, 20), (2, 9))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A random model whose stop id, were it looked for, would soon end a text."""
    reference = random_reference("qwen3", num_hidden_layers=1)
    prompts, _ = texts_of("").draw()
    ids = reference.generate(reference.dummy_inputs["input_ids"][:0].new_tensor([prompts[0]]))
    stop = int(ids[0, len(prompts[0])])
    reference.config.eos_token_id = reference.generation_config.eos_token_id = stop
    return save_reference(reference, tmp_path_factory.mktemp("throughput") / "small")


def test_texts_are_drawn_from_their_ranges_and_again_the_same():
    many = ManyTexts("", 320, 3000, (3, 6), (2, 4))
    prompts, answers = many.draw()
    for lengths, (least, most) in ((map(len, prompts), (3, 6)), (answers, (2, 4))):
        counts = np.bincount(list(lengths))[least:]
        assert len(counts) == most - least + 1
        np.testing.assert_allclose(counts / 3000, 1 / len(counts), atol=0.04)
    assert many.draw() == (prompts, answers)


def test_batches_are_of_prompts_of_similar_length():
    prompts = [[0] * n for n in (5, 1, 4, 2, 3)]
    assert list(batches(prompts, 2)) == [[1, 3], [4, 2], [0]]


def test_spans_of_time_that_overlap_count_once():
    assert length_of_union([(4, 5), (0, 2), (1, 3), (0.5, 0.6)]) == pytest.approx(4)
    assert length_of_union([]) == 0


def test_all_writers_write_the_texts_that_the_reference_writes_one_by_one(small):
    """Exactly as many tokens as asked for, across the stop id, in the order of the prompts."""
    prompts, answers = texts_of(small).draw()
    reference = WRITERS["transformers"](small)
    alone = [
        reference.write([prompt], [answer], 1)[0][0]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert [len(text) for text in alone] == answers
    for name, make in WRITERS.items():
        writer = make(small)
        for is_first in (True, False):
            found = write_all(writer, prompts, answers, 2)
            assert found.texts == alone
            assert found.seconds > 0
            assert set(found.shares) == ({"occupancy", "writing"} if name == "slots" else set())
            # Compiled once.
            assert (found.compiling > 0) == (name != "transformers" and is_first)


def a_pass(way, size, searching, rate, equal=1.0, **shares):
    return Pass("w", "m", way, size, searching, 100, 100 / rate, 1.0, shares, equal)


PASSES = [
    *(
        a_pass(way, size, True, rate + size, occupancy=0.9, writing=0.8)
        for way, rate in zip(WAYS, (60, 40, 20), strict=True)
        for size in (4, 8)
    ),
    *(
        a_pass(way, 8, False, rate, 0.99, occupancy=0.95)
        for way, rates in zip(WAYS, ((66, 60), (40, 42), (21,)), strict=True)
        for rate in rates
    ),
]


def test_the_tables_tell_ratios_of_medians_of_the_best_sizes():
    assert best_sizes(PASSES) == dict.fromkeys(WAYS, 8)
    assert best_sizes(PASSES[::2]) == dict.fromkeys(WAYS, 4)
    searched, best = throughput_tables(PASSES, {"static": 1.4, "transformers": 2.0}).split("\n\n")
    rows = [cells(line) for line in searched.splitlines()]
    assert rows[0][0] == "w: rows"
    assert rows[2:] == [
        ["4", "64", "44", "24", "90%", "80%"],
        ["8", "68", "48", "28", "90%", "80%"],
    ]
    rows = [cells(line) for line in best.splitlines()]
    assert rows[2:] == [
        ["slots", "8", "66 (60 to 68)", "-", "95% (aim 85%)", "99.0%"],
        ["static", "8", "42 (40 to 48)", "1.57 (aim 1.40)", "-", "99.0%"],
        ["transformers", "8", "24.5 (21 to 28)", "2.69 (aim 2.00)", "-", "99.0%"],
    ]


def test_passes_that_are_done_are_not_made_again(small, monkeypatch):
    many, made = texts_of(small), []

    class Child:
        def __init__(self, name, task):
            self.name = name

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def work(self, how):
            made.append((self.name, how["size"]))
            # The larger size is the slower one.
            seconds = {"write": how["size"], "compile": 0.0}
            return throughput_reading(seconds, [7] * 30)

    monkeypatch.setattr(throughput, "Child", Child)
    done = list(new_passes(many, "m", (2, 3, 2), 2, []))
    assert [(p.size, p.searching) for p in done[3:6]] == [(3, True)] * 3
    assert [(p.way, p.size, p.searching) for p in done[6:]] == [(w, 2, False) for w in WAYS]
    # What has searched is warm.
    assert len(made) == len(done) == 9
    assert done[0].equal is None
    assert {p.equal for p in done[1:]} == {1.0}
    assert read_passes(json.loads(json.dumps([p.record() for p in done]))) == done
    assert list(new_passes(many, "m", (2, 3), 2, done)) == []
    made.clear()
    # An interrupted run goes on: the engine that is started anew makes a pass that does not count.
    (last,) = new_passes(many, "m", (2, 3), 2, done[:-1])
    assert (last.way, made) == ("transformers", [("transformers", 2)] * 2)
    assert len(list(new_passes(many, "other", (2,), 1, done))) == 3


def throughput_reading(seconds, outcome):
    from qwen_jax.benchmark.serving import Reading

    return Reading(seconds, outcome, {"occupancy": 1.0, "writing": 1.0})


def test_engines_that_do_not_write_the_same_are_refused(small, monkeypatch):
    monkeypatch.setattr(throughput, "LEAST_EQUAL", 1.1)
    message = "static and slots do not write the same, .*: 100% of [0-9]+ tokens are equal"
    with pytest.raises(UserError, match=message):
        list(new_passes(texts_of(small), "m", (2,), 1, []))


def test_a_run_prints_tables_draws_them_and_goes_on(run_tool, small, tmp_path):
    arguments = (
        "--workload=throughput",
        f"--model={small}",
        f"--workdir={tmp_path}",
        f"--prompts={COUNT}",
        "--prompt_range=3,20",
        "--answer_range=2,9",
        "--sizes=2,4",
    )
    result = run_tool("benchmark", *arguments, "--repeats=1")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        f"| {COUNT} prompts of 3 to 20, answers of 2 to 9: rows | slots, tok"
    )
    assert [cells(line)[0] for line in lines[2:4] + lines[7:]] == ["2", "4", *WAYS]
    assert all(cells(line)[-1] in ("100.0%", "-") for line in lines[7:])
    assert (tmp_path / "throughput.md").read_text() == result.stdout
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert len(records) == 2 * len(WAYS)
    _, answers = texts_of(small).draw()
    for record in records:
        assert record["tokens"] == sum(answers)
        assert record["workload"] == "throughput"
        assert record["git"]
        assert record["flags"]["sizes"] == ["2", "4"]
    again = run_tool("benchmark", *arguments, "--repeats=1")
    assert (again.returncode, again.stdout) == (0, result.stdout)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt_range=3,20"], "--prompt_range needs --answer_range beside it"),
        (["--answer_range=3,20"], "--answer_range needs --prompt_range beside it"),
        (["--prompt_range=20,3", "--answer_range=2,9"], "--prompt_range=20,3 should be LEAST,MOST"),
        (["--prompt_range=3", "--answer_range=2,9"], "--prompt_range=3 should be LEAST,MOST"),
        (["--prompt_range=3,5", "--answer_range=0,9"], "--answer_range=0,9 should be numbers"),
        (["--prompt_range=3,5", "--answer_range=a,9"], "--answer_range=a,9 should be numbers"),
        (["--sizes=4,0"], "--sizes=4,0 should be numbers above 0"),
        (["--sizes="], "--sizes= should be numbers above 0"),
        (
            ["--prompt_range=3,200", "--answer_range=2,57"],
            "256 positions, too few for texts of 257",
        ),
        (["--mesh=fsdp:2"], "--mesh is not for --workload=throughput"),
    ],
)
def test_bad_input_is_refused(run_tool, small, tmp_path, arguments, message):
    workdir = tmp_path / "out"
    arguments = (f"--model={small}", f"--workdir={workdir}", *arguments)
    line = refusal(run_tool("benchmark", "--workload=throughput", *arguments))
    assert message in line
    assert not workdir.exists()
