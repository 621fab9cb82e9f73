import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.text import StopStrings

# The first 256 ids are single bytes: sequences of them are mostly invalid UTF-8.
random_ids = st.lists(
    st.one_of(st.integers(0, 255), st.integers(0, 151700), st.sampled_from([151645, 151900])),
    max_size=40,
)
short_text = st.text(alphabet="abc\n", max_size=12)


@settings(max_examples=300, deadline=None)
@given(ids=random_ids, skip=st.booleans(), size=st.integers(1, 5))
def test_streamed_text_joins_to_the_whole_decode(qwen3, reference, ids, skip, size):
    stream = qwen3.stream(skip_special_tokens=skip)
    parts = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    parts.append(stream.finish())
    assert "".join(parts) == qwen3.decode(ids, skip_special_tokens=skip)
    assert "".join(parts) == reference.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_valid_text_never_shows_a_broken_character(qwen3, text):
    text = text.replace("\ufffd", "")
    stream, shown = qwen3.stream(), ""
    for token_id in qwen3.encode(text, allow_special=False):
        shown += stream.push(token_id)
        assert "\ufffd" not in shown
    shown += stream.finish()
    assert shown == qwen3.decode(qwen3.encode(text, allow_special=False))


def test_an_unfinished_character_is_held_back_and_then_replaced(qwen3):
    ids = qwen3.encode("𒀀")
    stream = qwen3.stream()
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.push(ids[-1]) == "𒀀"
    stream.push(ids[:-1])
    assert stream.finish() == "\ufffd"


def test_a_token_costs_the_same_late_as_early(qwen3):
    stream = qwen3.stream()
    ids = qwen3.encode("word 词 ") * 20_000
    begin = time.perf_counter()
    for token_id in ids:
        stream.push(token_id)
    # Decoding all text anew for each token would take minutes.
    assert time.perf_counter() - begin < 5


def first_stop(text, stops):
    """The rule itself: of all occurrences the one that starts first, then the shortest."""
    found = [(text.index(stop), len(stop), stop) for stop in stops if stop in text]
    return min(found, default=(len(text), 0, None))


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(short_text, max_size=8),
    stops=st.lists(st.text(alphabet="abc\n", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_cut_before_the_first_match_however_the_text_is_split(pieces, stops):
    watcher, shown = StopStrings(stops), ""
    expected, _, stop = first_stop("".join(pieces), stops)
    for piece in pieces:
        shown += watcher.push(piece)
        assert "".join(pieces)[:expected].startswith(shown)
    shown += watcher.finish()
    assert shown == "".join(pieces)[:expected]
    assert watcher.matched == stop


def test_a_stop_string_is_held_back_across_pushes_and_reported():
    watcher = StopStrings(["\nObservation:"])
    assert watcher.push("do it\nObs") == "do it"
    assert watcher.matched is None
    assert watcher.push("erve\nObserv") == "\nObserve"
    assert watcher.push("ation: 5") == ""
    assert watcher.matched == "\nObservation:"
    assert watcher.push("more") == "" and watcher.finish() == ""


def test_held_back_text_comes_out_at_the_end():
    watcher = StopStrings("STOP")
    assert watcher.push("a STO") == "a "
    assert watcher.finish() == "STO"
    assert watcher.matched is None


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_empty_stop_strings_are_refused(stops):
    with pytest.raises(UserError, match="non-empty text"):
        StopStrings(stops)


def test_a_stop_string_waits_for_one_that_began_before_it():
    watcher = StopStrings(["xab", "a"])
    assert watcher.push("-xa") == "-" and watcher.matched is None
    assert watcher.push("c") == "x" and watcher.matched == "a"
    watcher = StopStrings(["xab", "a"])
    assert watcher.push("-xa") == "-"
    assert watcher.push("b") == "" and watcher.matched == "xab"
    watcher = StopStrings(["xab", "a"])
    assert watcher.push("-xa") + watcher.finish() == "-x" and watcher.matched == "a"
