"""Tokenises data ahead, so that training reads tokens from disk.

    python -m tools.prepare_data --model=Qwen/Qwen3-0.6B --input=texts.jsonl --workdir=prepared
    python -m tools.prepare_data --config=run.py --workdir=prepared --workers=8
    python -m tools.prepare_data --config=run.py --config.data.tokens.thinking=False ...

Each source becomes a directory of its own, WORKDIR/NAME, which stands as path of a source where the
file stood. Sources are files of JSONL ({"text": "..."}, or {"messages": [...]} with "tools",
"enable_thinking" and "chat_template_kwargs" if you like), of text (one document, or several between
lines of <|endoftext|>) or of parquet; directories of these; patterns; and data sets of the hub.

A run that was interrupted goes on where it was when it is started again, and what it writes is the
same with any number of --workers. --config reads of a run's configuration `data`, with the fields
of qwen_jax.training.data.DataOptions, and `tokenizer`, or else `model`, whose tokenizer is the one
that the run trains with; sources that are prepared already are left alone.
"""

import dataclasses
from pathlib import Path

from absl import flags
from tqdm import tqdm

from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.errors import UserError
from qwen_jax.training.data import DataOptions, SourceOptions, TokenOptions
from qwen_jax.training.data.indexed import is_prepared
from qwen_jax.training.data.prepare import RECORDS_A_PART, prepare
from tools import command_line, config_flag

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the directories go.", required=True)
_MODEL = flags.DEFINE_string(
    "model", None, "Whose tokenizer: a checkpoint directory or hub id; else the configuration's."
)
_INPUT = flags.DEFINE_multi_string(
    "input", [], "A source; may be given several times. Else the configuration's."
)
_WORKERS = flags.DEFINE_integer("workers", 1, "Processes that tokenise.", lower_bound=1)
_RECORDS_A_PART = flags.DEFINE_integer(
    "records_a_part",
    RECORDS_A_PART,
    "Records that are written together; what is lost when a run is killed.",
    lower_bound=1,
)
_END_OF_TEXT = flags.DEFINE_string(
    "end_of_text", None, 'Token behind each text, "" for none; by default the checkpoint\'s.'
)
_LEARN = flags.DEFINE_list(
    "learn", None, "Roles of chats whose words are learned; by default assistant."
)
_THINKING = flags.DEFINE_bool("thinking", None, "Whether the assistant's thinking is learned.")
_TOOL_CALLS = flags.DEFINE_bool("tool_calls", None, "Whether its tool calls are learned.")
_LAST_TURN_ONLY = flags.DEFINE_bool("last_turn_only", None, "Learn the last such turn only.")


def main() -> None:
    """Prepares one source after another."""
    workdir = command_line.path(_WORKDIR)
    checkpoint, sources, tokens = _settings()
    targets = _targets(workdir, sources)
    tokenizer_directory = resolve_source(checkpoint, weights=False)
    for source, target in zip(sources, targets, strict=True):
        # Silent where stderr is not a terminal.
        with tqdm(desc=target.name, unit=" records", disable=None) as bar:

            def on_part(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.n = done
                bar.refresh()

            meta = prepare(
                target,
                tokenizer_directory,
                source,
                tokens,
                _WORKERS.value,
                _RECORDS_A_PART.value,
                on_part,
            )
        print(f"{target}: {sum(meta.records)} records, {sum(meta.tokens)} tokens, {meta.kind}")


def _settings() -> tuple[str, list[SourceOptions], TokenOptions]:
    """Whose tokenizer, the sources and how they are read; flags before the configuration."""
    config = config_flag.read_config()
    checkpoint, sources, tokens = _MODEL.value, [], TokenOptions()
    if config is not None:
        part = config_flag.require(config, "data", "config")
        data = config_flag.from_config(part, DataOptions, "config.data")
        sources, tokens = list(data.sources), data.tokens
        checkpoint = checkpoint or config.get("tokenizer") or config.get("model")
    if _INPUT.value:
        sources = [SourceOptions(path) for path in _INPUT.value]
    flags_of_tokens = (_END_OF_TEXT, _LEARN, _THINKING, _TOOL_CALLS, _LAST_TURN_ONLY)
    given = {flag.name: flag.value for flag in flags_of_tokens if flag.value is not None}
    if "learn" in given:
        given["learn"] = tuple(given["learn"])
    if not sources:
        raise UserError("no source is named; give --input=FILE, or --config=FILE.py")
    if not isinstance(checkpoint, str) or not checkpoint:
        raise UserError(
            "no tokenizer is named; give --model, or tokenizer or model in the configuration"
        )
    return checkpoint, sources, dataclasses.replace(tokens, **given)


def _targets(workdir: Path, sources: list[SourceOptions]) -> list[Path]:
    """A directory for each source that is not prepared yet; those that are leave the list."""
    sources[:] = [source for source in sources if not is_prepared(Path(source.path).expanduser())]
    if not sources:
        raise UserError("all sources are prepared already; there is nothing to do")
    names = [source.name or _name(source.path) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: several sources have this name; give them different names")
    return [workdir / name for name in names]


def _name(path: str) -> str:
    """A directory's name of the last part of a path, without what patterns are made of."""
    stem = Path(path).name
    for ending in (".jsonl", ".txt", ".parquet"):
        stem = stem.removesuffix(ending)
    return "".join(c for c in stem if c not in "*?[]").strip(".-_") or "data"


if __name__ == "__main__":
    command_line.run(main)
