"""Writes text with a checkpoint.

    python -m tools.generate --model=DIR --prompt="Once upon a time"
    python -m tools.generate --model=Qwen/Qwen3-0.6B --chat --prompt="What is a mesh?"
    python -m tools.generate --model=DIR --input=prompts.jsonl --output=json
    python -m tools.generate --model=Qwen/Qwen3-8B --chat --thinking_budget=200 --prompt="Why?"
    python -m tools.generate --model=Qwen/Qwen2.5-Coder-7B --infill --input=holes.jsonl
    python -m tools.generate --model=DIR --adapter=sql=DIR --use_adapter=sql --prompt="Select"
    python -m tools.generate --model=DIR --speculate=lookup --prompt="Once upon a time"
    python -m tools.generate --model=Qwen/Qwen3-8B --speculate=draft \\
        --draft_model=Qwen/Qwen3-0.6B --prompt="Once upon a time"

One prompt streams; several run together, --batch_size at a time, the next one as soon as a text has
ended. A line of --input holds

* {"prompt": "..."}, or
* with --chat, {"messages": [...], "tools": [...]} where tools may be left out, or
* with --infill, {"prefix": "...", "suffix": "..."} of a file, whose middle is then written. With
  {"repository": "name", "path": "a.py", "files": [{"path": "b.py", "content": "..."}]} besides,
  other files of its repository come first.

A line's "adapter" picks one of several --adapter=NAME=DIR by name, null the model without any. The
model is loaded once.

With --workdir=DIR they are kept in DIR as soon as they end, and are in DIR/completions.jsonl in the
order of the prompts when all have; a run that was interrupted goes on with the rest.

--output=json writes each line's fields and adds text, token_ids, prompt_tokens and finish_reason.
With --chat it also takes the text apart: reasoning (null if there is none), content, tool_calls
([{"name": "...", "arguments": {...}}]) and problems ([{"reason": "...", "text": "..."}], where
broken tool calls are).

--cache_dtype=int8 keeps keys and values in about a quarter of float32's memory, or half of
bfloat16's; how far that moves what is predicted, `tools.evaluate --text` measures.

With --speculate several tokens are guessed and verified in one pass of the model, --draft_tokens
at a time. Greedy texts stay the same, drawn ones as likely; how many guesses stood is told on
stderr. Prompts then run in batches, --batch_size in each until the last of them has ended.

Several processes, as on a TPU pod, run it together with one --mesh over all their devices; each
reads the same prompts, and the first one prints.
"""

import dataclasses
import sys
from typing import Any

import tqdm
from absl import flags

from qwen_jax.errors import UserError
from qwen_jax.inference.bulk import completions
from qwen_jax.inference.completion import (
    Completion,
    ThinkingBudget,
    ends_inside_reasoning,
    finished_texts,
)
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.drafting import Drafter
from qwen_jax.inference.speculation import Counts, SpeculativeStream
from qwen_jax.text import (
    Tokenizer,
    file_infill,
    infill_stop_ids,
    parse_reply,
    repository_infill,
)
from tools import (
    adapter_flags,
    cache_flag,
    command_line,
    mesh_flag,
    model_flags,
    processes,
    speculation_flags,
    text_flags,
)
from tools.jsonl_rows import as_json, read_rows
from tools.kept_results import KeptResults

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue")
_INPUT = flags.DEFINE_string("input", None, "A JSONL file of prompts or of chat messages.")
_CHAT = flags.DEFINE_bool("chat", False, "Prompts are what a user says to the assistant.")
_SYSTEM = flags.DEFINE_string("system", None, "With --chat: the system message of --prompt.")
_INFILL = flags.DEFINE_bool(
    "infill", False, "Lines of --input are files with a hole: prefix and suffix."
)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "json: one object a line.")
_WORKDIR = flags.DEFINE_string("workdir", None, "With --input: where texts go, as they end.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Prompts that run together.", lower_bound=1)


def main() -> None:
    """Reads the prompts, loads the model, writes the completions in order."""
    requests = _read_requests()
    speculation_flags.check_flags()
    directories = adapter_flags.read_flags()
    chosen = [adapter_flags.adapter_of(name, row, directories) for name, row in requests]
    processes.join(mesh_flag.MESH.value)
    kept = None if _WORKDIR.value is None else _open_results([row for _, row in requests])
    session = text_flags.open_session()
    prompts = [_prompt_ids(session, name, request) for name, request in requests]
    drafter = speculation_flags.load_drafter(
        speculation_flags.SPECULATE.value,
        session.model,
        session.tokenizer,
        model_flags.DTYPE.value,
    )
    adapted = adapter_flags.load(session.model, session.params, directories)
    stop_ids = session.stop_ids
    if _INFILL.value:
        stop_ids = (*(stop_ids or ()), *infill_stop_ids(session.tokenizer))
    if len(prompts) == 1 and _OUTPUT.value == "text" and kept is None:
        _stream(session, adapted[chosen[0]], prompts, stop_ids, drafter)
        return
    left = [i for i in range(len(prompts)) if kept is None or i not in kept.done]
    bar = tqdm.tqdm(
        total=len(prompts),
        initial=len(prompts) - len(left),
        desc="writing",
        unit="text",
        disable=None,
    )
    waiting: dict[int, dict[str, Any]] = {}
    printed, counts = 0, []
    for adapter in dict.fromkeys(chosen[i] for i in left):
        own = [i for i in left if chosen[i] == adapter]
        for place, completion in completions(
            session.model,
            adapted[adapter],
            session.tokenizer,
            [prompts[i] for i in own],
            session.max_new_tokens,
            session.options,
            stop_ids,
            text_flags.STOP.value,
            _BATCH_SIZE.value,
            text_flags.SEED.value,
            rows=own,
            thinking_limit=text_flags.THINKING_BUDGET.value,
            cache_dtype=cache_flag.CACHE_DTYPE.value,
            speculate=drafter,
            on_counts=counts.append,
        ):
            i = own[place]
            record = {**requests[i][1], **_record(prompts[i], completion)}
            if _CHAT.value:
                record |= _taken_apart(session.tokenizer, prompts[i], record)
            bar.update(1)
            if kept is not None:
                kept.add(i, record)
                continue
            waiting[i] = record
            while printed in waiting:
                _print_completion(printed, len(prompts), waiting.pop(printed))
                printed += 1
    bar.close()
    if kept is not None:
        kept.finish()
        print(f"{len(prompts)} texts in {kept.path}")
    if drafter is not None:
        speculation_flags.report(sum(counts, Counts()))


def _stream(
    session: text_flags.Session,
    params: Any,
    prompts: list[list[int]],
    stop_ids: tuple[int, ...] | None,
    drafter: Drafter | None,
) -> None:
    """Writes one text while it grows."""
    model, most, options = session.model, session.max_new_tokens, session.options
    seed, cache_dtype = text_flags.SEED.value, cache_flag.CACHE_DTYPE.value
    arguments = model, params, prompts, most
    if drafter is None:
        stream = TokenStream(*arguments, options, stop_ids, seed, cache_dtype=cache_dtype)
    else:
        stream = SpeculativeStream(
            *arguments, drafter, options, stop_ids, seed, cache_dtype=cache_dtype
        )
    limit = text_flags.THINKING_BUDGET.value
    budget = None if limit is None else ThinkingBudget(limit, session.tokenizer, prompts)
    for _ in finished_texts(stream, 1, session.tokenizer, text_flags.STOP.value, _write, budget):
        print()
    if drafter is not None:
        speculation_flags.report(stream.counts)


def _open_results(requests: list[dict[str, Any]]) -> KeptResults:
    """The results of an earlier run of the same prompts with the same flags, or none yet."""
    if _PROMPT.value:
        raise UserError("--workdir is for --input=FILE.jsonl; what --prompt asks is printed")
    # What changes no text may be another the next time.
    free = ("workdir", "input", "batch_size", "mesh")
    said = {name: value for name, value in command_line.settings().items() if name not in free}
    return KeptResults(command_line.path(_WORKDIR), requests, said)


def _write(row: int, text: str) -> None:
    del row
    sys.stdout.write(text)
    sys.stdout.flush()


def _record(prompt: list[int], completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "token_ids": completion.ids,
        "prompt_tokens": len(prompt),
        "finish_reason": completion.finish_reason,
    }


def _taken_apart(tokenizer: Tokenizer, prompt: list[int], record: dict[str, Any]) -> dict[str, Any]:
    """The fields that a reply adds to a record."""
    thinking_open = ends_inside_reasoning(tokenizer, prompt)
    reply = parse_reply(record["text"], thinking_open, record.get("tools"))
    return {
        "reasoning": reply.reasoning,
        "content": reply.content,
        "tool_calls": [{"name": c.name, "arguments": c.arguments} for c in reply.tool_calls],
        "problems": [dataclasses.asdict(problem) for problem in reply.problems],
    }


def _print_completion(i: int, total: int, record: dict[str, Any]) -> None:
    if _OUTPUT.value == "json":
        print(as_json(record), flush=True)
    else:
        print(f"--- {i + 1} of {total}\n{record['text']}", flush=True)


def _read_requests() -> list[tuple[str, dict[str, Any]]]:
    """Each prompt with the name that errors call it by."""
    if _INFILL.value and (_CHAT.value or _PROMPT.value or _INPUT.value is None):
        raise UserError("--infill takes --input=FILE.jsonl, and neither --chat nor --prompt")
    if bool(_PROMPT.value) == (_INPUT.value is not None):
        raise UserError("give --prompt (repeatable) or --input=FILE.jsonl, and not both")
    if _SYSTEM.value is not None and not (_CHAT.value and _PROMPT.value):
        raise UserError("--system needs --chat and --prompt")
    if text_flags.THINKING.value is not None and not _CHAT.value:
        raise UserError("--thinking needs --chat: it is for the chat template")
    if text_flags.THINKING_BUDGET.value is not None and not _CHAT.value:
        raise UserError("--thinking_budget needs --chat: only there models think")
    if _PROMPT.value:
        return [(f"prompt {i}", {"prompt": text}) for i, text in enumerate(_PROMPT.value, 1)]
    return [(name, _checked(name, row)) for name, row in read_rows(command_line.path(_INPUT))]


def _checked(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """The row of an input file, if it has the fields that the flags ask for."""
    if _INFILL.value:
        _check_hole(name, request)
        return request
    for field in ("messages", "tools"):
        if field in request and not _CHAT.value:
            raise UserError(f"{name}: {field} needs --chat")
    if ("prompt" in request) == ("messages" in request):
        choices = "either prompt or messages" if _CHAT.value else "prompt"
        raise UserError(f"{name}: needs {choices}; has {', '.join(request) or 'nothing'}")
    if "prompt" in request and not isinstance(request["prompt"], str):
        raise UserError(f"{name}: prompt should be a string")
    return request


_REPOSITORY = ("repository", "path", "files")


def _check_hole(name: str, request: dict[str, Any]) -> None:
    needed = ["prefix", "suffix"]
    if any(field in request for field in _REPOSITORY):
        needed += _REPOSITORY
    missing = [field for field in needed if field not in request]
    if missing:
        raise UserError(f"{name}: needs {', '.join(missing)} besides {', '.join(request)}")
    files = request.get("files", [])
    if not isinstance(files, list) or not all(
        isinstance(file, dict) and file.keys() >= {"path", "content"} for file in files
    ):
        raise UserError(f"{name}: files should be a list of objects with path and content")


def _prompt_ids(session: text_flags.Session, name: str, request: dict[str, Any]) -> list[int]:
    try:
        ids = _encode(session.tokenizer, request)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if not ids:
        raise UserError(f"{name}: is empty; give some text to continue")
    session.check_length(ids, name)
    return ids


def _encode(tokenizer: Tokenizer, request: dict[str, Any]) -> list[int]:
    if _INFILL.value and "repository" in request:
        return repository_infill(
            tokenizer,
            request["repository"],
            [(file["path"], file["content"]) for file in request["files"]],
            request["path"],
            request["prefix"],
            request["suffix"],
        )
    if _INFILL.value:
        return file_infill(tokenizer, request["prefix"], request["suffix"])
    allow_special = text_flags.ALLOW_SPECIAL.value
    if not _CHAT.value:
        return tokenizer.encode(request["prompt"], allow_special=allow_special)
    messages = request.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": request["prompt"]}]
        if _SYSTEM.value is not None:
            messages = [{"role": "system", "content": _SYSTEM.value}, *messages]
    return tokenizer.apply_chat_template(
        messages,
        tools=request.get("tools"),
        add_generation_prompt=True,
        allow_special=allow_special,
        **text_flags.template_variables(),
    )


if __name__ == "__main__":
    command_line.run(main, alone=False)
