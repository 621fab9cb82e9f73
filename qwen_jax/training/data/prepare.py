"""Tokenises a source ahead, into the directory that `indexed` reads.

Records are cut into parts by number alone, each part is written under another name and renamed,
and meta.json comes last. So a run that was killed goes on with the parts that are missing, and the
bytes are the same however many processes write them.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json_object
from qwen_jax.text import Tokenizer, load_tokenizer
from qwen_jax.training.data.indexed import (
    ENDS,
    LEARNED,
    META,
    PLAN,
    TOKENS,
    IndexMeta,
    fingerprint,
    part_directory,
    read_meta,
    templates_fingerprint,
)
from qwen_jax.training.data.options import SourceOptions, TokenOptions
from qwen_jax.training.data.records import Records, open_records
from qwen_jax.training.data.tokenise import Kind, open_examples, tokenise

RECORDS_A_PART = 8192

_EDGE = 1 << 20


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a process needs to write any part."""

    target: Path
    tokenizer_directory: Path
    source: SourceOptions
    options: TokenOptions
    kind: Kind
    dtype: str
    records_a_part: int


def prepare(
    target: Path,
    tokenizer_directory: Path,
    source: SourceOptions,
    options: TokenOptions,
    workers: int = 1,
    records_a_part: int = RECORDS_A_PART,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> IndexMeta:
    """Writes a source's tokens to `target`, or what is missing of them.

    Args:
      target: a new directory, or one that an interrupted run of the same settings left.
      tokenizer_directory: of the checkpoint.
      source: what to read.
      options: how records become tokens.
      workers: processes that tokenise.
      records_a_part: of all parts but the last.
      on_part: called with the records that are done, and all.

    Raises:
      UserError: a record is broken, or `target` was begun with other settings or holds other
        things; what was written stays, for the next run.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    records, kind = open_examples(source, tokenizer, options)
    plan = _plan(records, tokenizer, source, options, records_a_part)
    dtype = "uint16" if tokenizer.max_id < 1 << 16 else "uint32"
    _begin(target, plan)
    sizes = [
        min(records_a_part, len(records) - start)
        for start in range(0, len(records), records_a_part)
    ]
    job = _Job(target, tokenizer_directory, source, options, kind, dtype, records_a_part)
    missing = [i for i in range(len(sizes)) if not part_directory(target, i).is_dir()]
    done = len(records) - sum(sizes[i] for i in missing)
    on_part(done, len(records))
    for number in _write_parts(job, missing, records, tokenizer, workers):
        done += sizes[number]
        on_part(done, len(records))
    if (target / META).exists():
        return read_meta(target)
    ends = [np.load(part_directory(target, i) / ENDS, mmap_mode="r") for i in range(len(sizes))]
    tokens = tuple(int(end[-1]) for end in ends)
    meta = IndexMeta(kind, dtype, fingerprint(tokenizer), tuple(sizes), tokens, plan)
    _write_whole(target / META, meta.as_json())
    return meta


def _plan(
    records: Records,
    tokenizer: Tokenizer,
    source: SourceOptions,
    options: TokenOptions,
    records_a_part: int,
) -> dict[str, Any]:
    """Everything that the bytes depend on."""
    fields = ("text_field", "messages_field", "tools_field")
    plan = {
        "tokenizer": fingerprint(tokenizer),
        "chat_templates": templates_fingerprint(tokenizer),
        "records": len(records),
        "records_a_part": records_a_part,
        "files": [_identity(path) for path in records.files],
        **{name: getattr(source, name) for name in fields},
        "options": dataclasses.asdict(options),
    }
    return json.loads(json.dumps(plan))


def _identity(path: Path) -> dict[str, Any]:
    """A file's name, size, and a hash of its two ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        digest.update(file.read(_EDGE))
    return {"name": path.name, "bytes": size, "sha256_of_ends": digest.hexdigest()}


def _begin(target: Path, plan: dict[str, Any]) -> None:
    """Writes the plan, or holds it against the one that is there."""
    path = target / PLAN
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(entry.name != f"{PLAN}.partial" for entry in target.iterdir()):
                raise UserError(f"{target}: holds other things; give a new directory")
            return _write_whole(path, plan)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    begun = read_json_object(path)
    changed = [name for name in {**begun, **plan} if begun.get(name) != plan.get(name)]
    if changed:
        raise UserError(
            f"{target}: was begun with other {', '.join(changed)}; give another directory, or "
            "delete this one"
        )
    for left in target.glob(".*.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
    return None


def _write_parts(
    job: _Job, missing: list[int], records: Records, tokenizer: Tokenizer, workers: int
):
    """Writes the parts and yields the number of each when it is there."""
    if workers == 1 or len(missing) < 2:
        for number in missing:
            _write_part(job, number, records, tokenizer)
            yield number
        return
    # Not forked: threads of JAX and of pyarrow may hold locks.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(missing)), multiprocessing.get_context("spawn"), _start_worker, (job,)
    )
    try:
        parts = {pool.submit(_write_part_in_worker, number): number for number in missing}
        for part in concurrent.futures.as_completed(parts):
            part.result()
            yield parts[part]
    except BrokenProcessPool:
        raise UserError(
            f"{job.target}: a worker was killed, perhaps for want of memory; run this again to go "
            "on, with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[_Job, Records, Tokenizer] | None = None


def _start_worker(job: _Job) -> None:
    global _worker
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = job, open_records(job.source), load_tokenizer(job.tokenizer_directory)


def _die_with_parent() -> None:
    """Ends this process when the one that started it is killed, which would leave it waiting."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _write_part_in_worker(number: int) -> None:
    job, records, tokenizer = _worker
    _write_part(job, number, records, tokenizer)


def _write_part(job: _Job, number: int, records: Records, tokenizer: Tokenizer) -> None:
    start = number * job.records_a_part
    examples = [
        tokenise(records[i], job.kind, tokenizer, job.source, job.options)
        for i in range(start, min(start + job.records_a_part, len(records)))
    ]
    ids = np.concatenate([example.ids for example in examples])
    folder = part_directory(job.target, number)
    partial = job.target / f".{folder.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir()
        _write_bytes(partial / TOKENS, ids.astype(np.dtype(job.dtype).newbyteorder("<")).tobytes())
        np.save(partial / ENDS, np.cumsum([len(example.ids) for example in examples], dtype="<u8"))
        if job.kind == "chat":
            learned = np.concatenate([example.learned for example in examples])
            _write_bytes(partial / LEARNED, np.packbits(learned).tobytes())
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); make room and run this again to go on"
        ) from None


def _write_bytes(path: Path, data: bytes) -> None:
    """Bytes that are on the disk when this returns, so that a renamed part is whole."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    _write_bytes(partial, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    partial.replace(path)
