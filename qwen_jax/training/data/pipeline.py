"""Batches of a run: sources -> records in order -> tokens -> rows -> batches, with a state.

Grain walks through it: a shuffle by number without a list in memory, threads that keep the order,
and a state that holds no data. What is left in packing buffers is read again.
"""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import grain
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer
from qwen_jax.training.data.form import Form, RowSource
from qwen_jax.training.data.indexed import IndexedRecords, is_prepared
from qwen_jax.training.data.options import DataOptions, SourceOptions, TokenOptions, TooLong
from qwen_jax.training.data.packing import BEGINS, TRUNCATED, Arrays, fit, pack, pad
from qwen_jax.training.data.records import Records
from qwen_jax.training.data.tokenise import Example, Kind, open_examples, tokenise


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a process's batches held so far.

    Attributes:
      records: that were begun.
      truncated: of these, whose end was dropped.
      tokens: that are not padding.
      learned: tokens whose loss is taken.
      padding: places without a token.
    """

    records: int = 0
    truncated: int = 0
    tokens: int = 0
    learned: int = 0
    padding: int = 0

    @property
    def padding_share(self) -> float:
        """Of all places."""
        return self.padding / max(1, self.padding + self.tokens)

    def __str__(self) -> str:
        return (
            f"{self.records} records, {self.truncated} of them truncated; {self.learned} of "
            f"{self.tokens} tokens learned; {self.padding_share:.1%} padding"
        )


class Batches(grain.DatasetIterator):
    """Batches for `Batch(**batch)`, [rows, length], with a state that goes into a checkpoint.

    Each has `input_ids`, `loss_weights`, `attention_mask`, `positions` and `segment_ids`, as
    `packing.finish` has them; of a `Form` what it has. Where sources are mixed by weight, rows are
    of one each, and `domains`, int32 [rows], is its number. The last batch of the last epoch is
    filled with rows of padding.

    Attributes:
      counts: of the batches so far; part of the state.
    """

    def __init__(self, dataset: grain.IterDataset):
        super().__init__()
        self._dataset = dataset
        self._rows = iter(dataset)
        self.counts = Counts()

    def __next__(self) -> Arrays:
        batch = dict(next(self._rows))
        marks = batch.pop("marks")
        tokens = int(batch["attention_mask"].sum())
        seen = Counts(
            records=int((marks & BEGINS > 0).sum()),
            truncated=int((marks & TRUNCATED > 0).sum()),
            tokens=tokens,
            learned=int(batch["loss_weights"].sum()),
            padding=marks.size - tokens,
        )
        pairs = zip(dataclasses.astuple(self.counts), dataclasses.astuple(seen), strict=True)
        self.counts = Counts(*(a + b for a, b in pairs))
        return batch

    def get_state(self) -> dict[str, Any]:
        """What `set_state` goes on from; JSON can hold it."""
        rows = copy.deepcopy(self._rows.get_state())
        return {"rows": rows, "counts": dataclasses.asdict(self.counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on with the batch that followed when the state was taken, also back."""
        # Grain's iterators keep some of what they had buffered when they are set.
        self._rows.close()
        self._rows = iter(self._dataset)
        self._rows.set_state(_tuples(state["rows"]))
        self.counts = Counts(**state["counts"])

    def close(self) -> None:
        """Ends the threads."""
        super().close()
        self._rows.close()


def make_loader(
    options: DataOptions,
    tokenizer: Tokenizer,
    process_index: int = 0,
    process_count: int = 1,
    form: Form | None = None,
) -> Batches:
    """The batches of one process, without end where `options.epochs` is None.

    Each record is read by one process. Where epochs are counted, processes may end some batches
    apart, since what packs into a row depends on what is packed: stop all when the first ends.

    Args:
      options: of the run.
      tokenizer: of the checkpoint.
      process_index: of this process.
      process_count: of all; a batch has `batch_size / process_count` rows here.
      form: of records that are rows of their own: pairs of answers, of which batches are [pairs, 2,
        length], the chosen answer first; or prompts, [prompts, length]. None for texts and chats.

    Raises:
      UserError: sources that cannot be read, or shared out among so many processes. While it runs,
        broken records too, by file and line.
    """
    if options.batch_size % process_count:
        raise UserError(
            f"batch_size = {options.batch_size} is not a multiple of the {process_count} processes"
        )
    here = options.batch_size // process_count
    if form is not None:
        _check_form(options, here, form)
        here //= form.rows
    opened = _open if form is None else form.open
    sources = [opened(source, tokenizer, options) for source in options.sources]
    if options.sources[0].weight is None:
        streams = [_rows(sources, options, options.seed, process_index, process_count)]
    else:
        streams = [
            _rows([source], options, (options.seed + i) % 2**32, process_index, process_count)
            for i, source in enumerate(sources)
        ]
    rows = streams[0]
    if len(streams) > 1:
        weights = [source.weight for source in options.sources]
        if form is None:
            streams = [
                stream.map(functools.partial(_of_domain, number))
                for number, stream in enumerate(streams)
            ]
        rows = grain.IterDataset.mix(streams, weights)
    # Rows of zeros are padding all through.
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=here)
    batches = rows.batch(here, drop_remainder=False, batch_fn=fill)
    if options.threads:
        # Rows are packed many at a time: as many batches ahead, so that steps do not wait for that.
        ahead = 2 + options.packing_rows // here
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead)
    return Batches(batches)


def _of_domain(number: int, row: Arrays) -> Arrays:
    return {**row, "domains": np.int32(number)}


def num_domains(options: DataOptions) -> int:
    """How many domains the rows of batches are said to be of; 0 where nothing is said."""
    weighted = options.sources[0].weight is not None and len(options.sources) > 1
    return len(options.sources) if weighted else 0


def _check_form(options: DataOptions, rows: int, form: Form) -> None:
    if options.pack:
        raise UserError(f"pack = True: {form.unpacked}; set it to False")
    if rows % form.rows:
        raise UserError(
            f"batch_size = {options.batch_size} leaves a process {rows} rows, and {form.takes}; "
            f"give a multiple of {form.rows * (options.batch_size // rows)}"
        )


@dataclasses.dataclass(frozen=True)
class _Source:
    """Records of one kind, and how they become examples that fit."""

    records: Records | IndexedRecords
    kind: Kind
    tokenizer: Tokenizer
    source: SourceOptions
    tokens: TokenOptions
    length: int

    @property
    def too_long(self) -> TooLong:
        return self.source.too_long or ("cut" if self.kind == "text" else "refuse")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Arrays:
        example = self.records[index]
        if not isinstance(example, Example):
            example = tokenise(example, self.kind, self.tokenizer, self.source, self.tokens)
        return fit(example, self.length, self.too_long)


def _open(source: SourceOptions, tokenizer: Tokenizer, options: DataOptions) -> _Source:
    directory = Path(source.path).expanduser()
    if is_prepared(directory):
        records = IndexedRecords(directory, tokenizer, options.tokens)
        kind = records.meta.kind
    else:
        records, kind = open_examples(source, tokenizer, options.tokens)
    return _Source(records, kind, tokenizer, source, options.tokens, options.length)


def _rows(
    sources: list[_Source] | list[RowSource],
    options: DataOptions,
    seed: int,
    process: int,
    processes: int,
) -> grain.IterDataset:
    """This process's rows of some sources together."""
    records = grain.MapDataset.concatenate([grain.MapDataset.source(s) for s in sources])
    if len(records) < processes:
        names = ", ".join(source.source.path for source in sources)
        raise UserError(
            f"{names}: {len(records)} records are fewer than the {processes} processes; give more"
        )
    if options.shuffle:
        records = records.shuffle(seed)
    examples = records.repeat(options.epochs)[process::processes].to_iter_dataset(
        grain.ReadOptions(options.threads, options.read_ahead if options.threads else 0)
    )
    if not isinstance(sources[0], _Source):
        return examples
    if not options.pack:
        return pad(examples, options.length)
    cut = all(source.too_long == "cut" for source in sources)
    shuffled = seed if options.shuffle else None
    return pack(examples, options.length, cut, options.packing_rows, shuffled)


def _tuples(state: Any) -> Any:
    """A state with its lists as tuples, of which JSON makes lists and Grain tells the two apart."""
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return tuple(_tuples(item) for item in state)
    return state
