"""Configuration files as dataclasses: what they say arrives, what they misspell is refused."""

import dataclasses
import enum
from typing import Literal

import pytest
from ml_collections import ConfigDict

from qwen_jax.errors import UserError
from qwen_jax.nn.router import Assignment, RouterOptions
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.data import DataOptions, SourceOptions, TokenOptions
from qwen_jax.training.step_options import TrainOptions
from tools.config_flag import from_config


class Way(enum.StrEnum):
    HERE = "here"
    THERE = "there"


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"
    way: Way = Way.HERE


@dataclasses.dataclass(frozen=True)
class Outer:
    needed: str
    count: int = 1
    maybe: int | None = None
    flag: bool = False
    inner: Inner = Inner()
    others: tuple[Inner, ...] = ()
    words: tuple[str, ...] = ("x",)


def test_fields_arrive_as_their_types():
    config = ConfigDict(
        {
            "needed": "n",
            "maybe": 3,
            "inner": {"rate": 2, "way": "there"},
            "others": ({"kind": "b"}, {"rate": 0.5}),
            "words": ["p", "q"],
        }
    )
    found = from_config(config, Outer, "config.part")
    assert found == Outer(
        "n", 1, 3, False, Inner(2.0, way=Way.THERE), (Inner(kind="b"), Inner(0.5)), ("p", "q")
    )
    assert type(found.inner.rate) is float
    assert type(found.inner.way) is Way


def test_a_dataclass_survives_the_way_into_a_file_and_back():
    options = DataOptions(
        (SourceOptions("a", weight=2.0, too_long="cut"), SourceOptions("b", weight=1.0)),
        length=77,
        tokens=TokenOptions(learn=("user", "tool"), thinking=False),
    )
    config = ConfigDict(dataclasses.asdict(options))
    assert from_config(config, DataOptions, "config.data") == options
    assert from_config(options, DataOptions, "config.data") is options
    step = TrainOptions(
        balance=BalanceOptions(loss=0.5, group="sequence", figures=False),
        router=RouterOptions(Assignment.BASE, rows=2, capacity_factor=1.5),
    )
    config = ConfigDict(dataclasses.asdict(step))
    assert from_config(config, TrainOptions, "config.step") == step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuont": 3}, "c.cuont is not a field of the configuration; did you mean count?"),
        (
            {"zzz": 3},
            "c.zzz is not a field of the configuration; known: needed, count, maybe, flag, inner, "
            "others, words",
        ),
        ({"inner": {"ratte": 1}}, "c.inner.ratte is not a field of the configuration; did you mea"),
        ({"count": 1.0}, "c.count = 1.0 should be an integer"),
        ({"count": True}, "c.count = True should be an integer"),
        ({"count": None}, "c.count = None should be an integer"),
        ({"maybe": "3"}, "c.maybe = '3' should be an integer"),
        ({"flag": 1}, "c.flag = 1 should be True or False"),
        ({"inner": {"rate": "1"}}, "c.inner.rate = '1' should be a number"),
        ({"inner": {"kind": "c"}}, "c.inner.kind = 'c' is not known; known: a, b"),
        ({"inner": {"way": "c"}}, "c.inner.way = 'c' is not known; known: here, there"),
        ({"inner": 3}, "c.inner = 3 should hold the fields of Inner"),
        ({"others": ({"rate": 1}, {"rat": 1})}, r"c.others\[1\].rat is not a field"),
        ({"words": "x"}, "c.words = 'x' should be a tuple"),
        ({"words": ("x", 1)}, r"c.words\[1\] = 1 should be text"),
    ],
)
def test_what_a_dataclass_has_not_is_refused_by_name(changes, message):
    for kind in (dict, ConfigDict):
        with pytest.raises(UserError, match="^" + message):
            from_config(kind({"needed": "n", **changes}), Outer, "c")


def test_a_needed_field_is_asked_for_and_errors_of_the_dataclass_name_the_part():
    with pytest.raises(UserError, match=r"^c\.needed is missing and needed$"):
        from_config({}, Outer, "c")
    with pytest.raises(UserError, match=r"^c: sources is empty; name at least one"):
        from_config({"sources": ()}, DataOptions, "c")
    with pytest.raises(UserError, match=r"^c\.balance: loss = -1\.0 must be at least 0$"):
        from_config({"balance": {"loss": -1}}, TrainOptions, "c")
