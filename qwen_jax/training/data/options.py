"""What is learned from, and in which rows: values that a run's configuration fills in."""

import dataclasses
from typing import Literal, get_args

from qwen_jax.errors import UserError
from qwen_jax.training.checks import SEED, Bounds, check_fields

TooLong = Literal["cut", "truncate", "refuse"]
Role = Literal["system", "user", "assistant", "tool"]


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """One source of records.

    Attributes:
      path: a `.jsonl`, `.txt` or `.parquet` file, a directory of such, a pattern such as
        `data/*.jsonl`, a directory that tools.prepare_data made, or a data set of the hub.
      weight: its share of the rows, relative to the other sources'. Either all sources have one,
        or none: then each record is seen once an epoch.
      too_long: what is done with a record that is longer than a row. "cut" splits it at the ends of
        rows, so that no token is lost; "truncate" drops its end, and counts it; "refuse" stops with
        an error. None: "cut" for texts, "refuse" for chats.
      split: which files of a directory or data set are read, where files are named by splits.
      files: a pattern of paths within the directory or data set, such as `en/*.parquet`.
      revision: branch, tag or commit of a data set of the hub.
      text_field: the field with a text.
      messages_field: the field with a conversation's messages.
      tools_field: the field with its tools.
      name: of the directory that tools.prepare_data makes of it; None for the path's last part.

    Raises:
      UserError: a value that none of these can have.
    """

    path: str
    weight: float | None = None
    too_long: TooLong | None = None
    split: str = "train"
    files: str | None = None
    revision: str | None = None
    text_field: str = "text"
    messages_field: str = "messages"
    tools_field: str = "tools"
    name: str | None = None

    def __post_init__(self):
        if not self.path:
            raise UserError("path of a source is empty; give a file, a directory or a hub id")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UserError(
                f"{self.path}: weight = {self.weight} must be positive; leave out what is not read"
            )
        if self.too_long not in (None, *get_args(TooLong)):
            raise UserError(
                f"{self.path}: too_long = {self.too_long} is not supported; known: "
                f"{', '.join(get_args(TooLong))}"
            )


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """How a record becomes tokens, and which of them are learned.

    Attributes:
      end_of_text: the added token behind each text, "" for none; None for `<|endoftext|>`, or the
        checkpoint's eos_token where there is no such token. Chats end as their template ends them.
      allow_special: whether control tokens that a text spells out become their ids. In chats only
        the template can write any.
      learn: the roles whose words are learned, and the `<|im_end|>` behind them; of every other
        token of a chat the loss is not taken. "tool" are the answers of tools.
      thinking: whether the assistant's `<think>` blocks are learned.
      tool_calls: whether its tool calls are.
      last_turn_only: whether only the last turn of those roles is learned. Templates such as
        Qwen3's leave the thinking out of earlier turns, where it was there when they were written.

    Raises:
      UserError: a role that is none, or none at all.
    """

    end_of_text: str | None = None
    allow_special: bool = False
    learn: tuple[Role, ...] = ("assistant",)
    thinking: bool = True
    tool_calls: bool = True
    last_turn_only: bool = False

    def __post_init__(self):
        unknown = [role for role in self.learn if role not in get_args(Role)]
        if unknown or not self.learn:
            found = ", ".join(map(str, unknown)) or "empty"
            raise UserError(f"learn is {found}; known roles: {', '.join(get_args(Role))}")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The batches of a run; the same options and seed give the same batches.

    Attributes:
      sources: what is read.
      length: tokens of a row.
      batch_size: rows of a batch, over all processes; a pair of answers is two.
      pack: whether rows hold several records; else each has one, and padding behind it.
      packing_rows: rows that are filled together where records are not cut; more of them leave less
        padding, and more is read again when a run goes on.
      shuffle: whether records are read in an order drawn anew each epoch, or as they stand.
      seed: of that order.
      epochs: how often each record is read; None for ever, and needed with weights.
      threads: that read and tokenise ahead; the order does not depend on them. 0 for none.
      read_ahead: records of each source that they hold ready.
      tokens: how records become tokens.

    Raises:
      UserError: a value that none of these can have.
    """

    sources: tuple[SourceOptions, ...]
    length: int = 2048
    batch_size: int = 8
    pack: bool = True
    packing_rows: int = 64
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None
    threads: int = 4
    read_ahead: int = 256
    tokens: TokenOptions = TokenOptions()

    def __post_init__(self):
        if not self.sources:
            raise UserError("sources is empty; name at least one file, directory or data set")
        some = Bounds(least=1)
        check_fields(
            self,
            length=Bounds(least=2),
            batch_size=some,
            packing_rows=some,
            seed=SEED,
            epochs=some,
            threads=Bounds(least=0),
            read_ahead=some,
        )
        weighted = [source for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            bare = next(source for source in self.sources if source.weight is None)
            raise UserError(f"{bare.path}: has no weight, other sources have; give all or none one")
        if weighted and self.epochs is not None:
            raise UserError(
                f"epochs = {self.epochs} with weights: sources end at different times; leave "
                "epochs out and set the steps of the run, or leave the weights out"
            )
