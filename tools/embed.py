"""Makes vectors or scores with embedders, rerankers, reward models, classifiers and guards.

    python -m tools.embed --model=Qwen/Qwen3-Embedding-0.6B --input=texts.jsonl --workdir=results
    python -m tools.embed --model=Qwen/Qwen3-Reranker-0.6B --input=pairs.jsonl --workdir=results
    python -m tools.embed --model=Qwen/Qwen2.5-Math-PRM-7B --input=solutions.jsonl --workdir=results

What a line of --input holds, and what is added to it in WORKDIR/TASK/results.jsonl, by task:

* embed: {"text": "..."}, a document, which may be empty, or with {"instruction": "..."} besides, a
  query with the task that it is for. Adds vector, of unit length; vectors.npy holds them all,
  float32.
* rerank: {"query": "...", "document": "..."}, if you like with instruction. Adds score, the
  probability that the document meets the query.
* reward: {"messages": [...]} or {"text": "..."}. Adds score.
* step_reward: {"messages": [...], "steps": ["...", "..."]}, or messages of which the last is the
  assistant's with <extra_0> after each step. Adds scores, the probability that each step is good.
* classify: {"messages": [...]} or {"text": "..."}. Adds scores, one for each label by name, before
  any softmax; of a token classifier tokens, their likeliest labels, and scores for each.
* guard: {"messages": [...]} or {"text": "..."}. Adds tokens, and for each of them scores by name:
  of risk_level and category if it is an answer's, of query_risk_level and query_category if a
  query's.

Lines keep their fields; one named as what is added is refused. run.json tells what the results
were made with. Nothing appears in WORKDIR before it is complete.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import qwen_jax
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.checkpoint.writer import new_directory, write_json
from qwen_jax.config import HeadKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import DTYPES, load_config
from qwen_jax.inference import scoring
from qwen_jax.json_fields import read_json_object, shown
from qwen_jax.models.decoder import Decoder
from qwen_jax.provenance import provenance
from qwen_jax.text import Tokenizer, scoring_prompts
from tools import command_line, mesh_flag, weights_flag
from tools.jsonl_rows import as_json, read_rows

Row = dict[str, Any]
NamedRow = tuple[str, Row]

_MODEL = flags.DEFINE_string(
    "model", None, "Checkpoint directory or hub id, such as Qwen/Qwen3-Embedding-0.6B.",
    required=True,
)  # fmt: skip
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go.", required=True)
_INPUT = flags.DEFINE_string("input", None, "A JSONL file of what to score.", required=True)
_TASK = flags.DEFINE_enum(
    "task",
    None,
    ["embed", "rerank", "reward", "step_reward", "classify", "guard"],
    "What to make; if not given, what the model's head and the first line are for.",
)
_DIMENSIONS = flags.DEFINE_integer(
    "dimensions", None, "With embed: of the vectors, which are cut; all if not given."
)
_INSTRUCTION = flags.DEFINE_string(
    "instruction",
    None,
    "With embed and rerank: the task of lines without one. For rerank it has a default; with "
    "embed, lines without any are documents.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Texts that run together.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "Of the parameters; float32 on CPU, else the checkpoint's."
)
_ALLOW_LONGER = flags.DEFINE_bool(
    "allow_longer", False, "Accept a text longer than the model's positions."
)
_FLAGS = (_MODEL, _WORKDIR, _INPUT, _TASK, _DIMENSIONS, _INSTRUCTION, _BATCH_SIZE, _DTYPE,
          mesh_flag.MESH, weights_flag.WEIGHTS)  # fmt: skip

# What a guard judges, in the order of its logits, and the field of config.json with the names.
_JUDGEMENTS = {
    "risk_level": "response_risk_level_map",
    "category": "response_category_map",
    "query_risk_level": "query_risk_level_map",
    "query_category": "query_category_map",
}


def main() -> None:
    """Reads the lines, loads the model, writes the results: the cheap things first."""
    workdir = command_line.path(_WORKDIR)
    rows = read_rows(command_line.path(_INPUT))
    directory = resolve_source(_MODEL.value)
    config = load_config(directory)
    task = _TASK.value or _default_task(config, rows[0][1])
    if _DIMENSIONS.value is not None and task != "embed":
        raise UserError(f"--dimensions is for --task=embed, the task is {task}")
    if _INSTRUCTION.value is not None and task not in ("embed", "rerank"):
        raise UserError(f"--instruction is for --task=embed and rerank, the task is {task}")
    _check_task(directory, config, task)
    # Around all that takes long, so that a folder that cannot be written is refused before.
    with new_directory(workdir / task) as folder:
        _write_results(folder, directory, config, task, rows)
    print(f"{len(rows)} lines in {workdir / task / 'results.jsonl'}")


def _write_results(
    folder: Path, directory: Path, config: ModelConfig, task: scoring.Task, rows: list[NamedRow]
) -> None:
    tokenizer = qwen_jax.load_tokenizer(directory)
    answers = _answer_ids(task, tokenizer, directory)
    labels = _label_names(directory, config) if task in ("classify", "guard") else []
    _check_overwritten(_added_fields(config, task), rows)
    texts = [_ids(config, task, tokenizer, name, row) for name, row in rows]
    model, params = qwen_jax.load_pretrained(
        directory, _DTYPE.value, mesh_flag.MESH.value, weights=weights_flag.WEIGHTS.value
    )
    # Of some embedders only the tensors tell.
    _check_task(directory, model.config, task)
    weights_flag.report_memory(directory, params)
    try:
        found, vectors = _results(task, model, params, tokenizer, texts, answers, labels)
    except scoring.NonfiniteScoresError as error:
        raise UserError(f"{rows[error.index][0]}: {error.reason}") from None
    origin = provenance(
        params["embed_tokens"]["weight"].dtype.name, {flag.name: flag.value for flag in _FLAGS}
    )
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        for (_, row), result in zip(rows, found, strict=True):
            file.write(as_json({**row, **result}) + "\n")
    if vectors is not None:
        np.save(folder / "vectors.npy", vectors)
    config_json = read_json_object(directory / "config.json")
    write_json(folder / "run.json", {"task": task, **origin, "config": config_json})


def _default_task(config: ModelConfig, row: Row) -> scoring.Task:
    # Embedders are published as language models too, as rerankers are.
    return _task_of_head(config) or ("rerank" if "query" in row else "embed")


def _task_of_head(config: ModelConfig) -> scoring.Task | None:
    """What a scoring head is for; None of any other."""
    match config.head, config.num_labels:
        case HeadKind.GUARD, _:
            return "guard"
        case HeadKind.TWO_LAYER_SCORE, 2:
            return "step_reward"
        case ((HeadKind.TWO_LAYER_SCORE | HeadKind.SCORE), 1):
            return "reward"
        case ((HeadKind.SCORE | HeadKind.SCORE_WITH_BIAS | HeadKind.TWO_LAYER_SCORE), _):
            return "classify"
    return None


def _check_task(directory: Path, config: ModelConfig, task: scoring.Task) -> None:
    try:
        scoring.check_task(config, task, _DIMENSIONS.value)
    except UserError as error:
        fitting = _task_of_head(config)
        hint = f", or give --task={fitting}" if fitting not in (None, task) else ""
        raise UserError(f"{directory}: {error}{hint}") from None


def _added_fields(config: ModelConfig, task: scoring.Task) -> tuple[str, ...]:
    match task:
        case "embed":
            return ("vector",)
        case "rerank" | "reward":
            return ("score",)
        case "classify" if config.head is HeadKind.SCORE_WITH_BIAS:
            return ("tokens", "labels", "scores")
        case "guard":
            return ("tokens", "scores")
    return ("scores",)


def _check_overwritten(added: tuple[str, ...], rows: list[NamedRow]) -> None:
    for name, row in rows:
        for field in added:
            if field in row:
                raise UserError(f"{name}: the results have a field {field} too; rename this one")


def _answer_ids(task: scoring.Task, tokenizer: Tokenizer, directory: Path) -> tuple[int, ...]:
    """The tokens that scores are of, or are read at, where the task has such."""
    try:
        match task:
            case "rerank":
                return scoring_prompts.answer_ids(tokenizer)
            case "step_reward":
                return (scoring_prompts.step_token_id(tokenizer),)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    return ()


def _ids(
    config: ModelConfig, task: scoring.Task, tokenizer: Tokenizer, name: str, row: Row
) -> list[int]:
    """The ids that the model reads of a line."""
    try:
        ids = _ENCODE[task](tokenizer, row)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if not ids:
        raise UserError(f"{name}: the text is empty; give some to score")
    if not _ALLOW_LONGER.value and config.exceeds_positions(len(ids)):
        raise UserError(
            f"{name}: {len(ids)} tokens are longer than max_position_embeddings = "
            f"{config.max_position_embeddings}; shorten the text, or give --allow_longer"
        )
    return ids


def _require(row: Row, *fields: str) -> None:
    missing = [field for field in fields if field not in row]
    if missing:
        raise UserError(f"needs {', '.join(missing)}; has {', '.join(row) or 'nothing'}")


def _texts(row: Row, *fields: str) -> list[str]:
    """The values of fields that are needed, as strings."""
    _require(row, *fields)
    for field in fields:
        if not isinstance(row[field], str):
            raise UserError(f"{field} should be a string, is {shown(row[field])}")
    return [row[field] for field in fields]


def _instruction(row: Row) -> str | None:
    if row.get("instruction") is None:
        return _INSTRUCTION.value
    return _texts(row, "instruction")[0]


def _encode_for_embedding(tokenizer: Tokenizer, row: Row) -> list[int]:
    (text,) = _texts(row, "text")
    instruction = _instruction(row)
    if instruction is None:
        return scoring_prompts.document_ids(tokenizer, text)
    return scoring_prompts.query_ids(tokenizer, text, instruction)


def _encode_pair(tokenizer: Tokenizer, row: Row) -> list[int]:
    query, document = _texts(row, "query", "document")
    instruction = _instruction(row)
    if instruction is None:
        instruction = scoring_prompts.WEB_SEARCH
    return scoring_prompts.rerank_ids(tokenizer, query, document, instruction)


def _encode_text_or_chat(tokenizer: Tokenizer, row: Row) -> list[int]:
    if ("text" in row) == ("messages" in row):
        raise UserError(f"needs either text or messages; has {', '.join(row) or 'nothing'}")
    if "text" in row:
        return tokenizer.encode(*_texts(row, "text"), allow_special=False)
    return tokenizer.apply_chat_template(row["messages"], allow_special=False)


def _encode_solution(tokenizer: Tokenizer, row: Row) -> list[int]:
    _require(row, "messages")
    messages, steps = row["messages"], row.get("steps")
    if steps is None:
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(last, dict) or last.get("role") != "assistant":
            raise UserError("needs steps, or messages of which the last is the assistant's")
        if not isinstance(last.get("content"), str):
            raise UserError("the content of the assistant's last message should be a string")
        messages, steps = messages[:-1], scoring_prompts.split_steps(last["content"])
    return scoring_prompts.solution_ids(tokenizer, messages, steps)


_ENCODE: dict[scoring.Task, Callable[[Tokenizer, Row], list[int]]] = {
    "embed": _encode_for_embedding,
    "rerank": _encode_pair,
    "reward": _encode_text_or_chat,
    "step_reward": _encode_solution,
    "classify": _encode_text_or_chat,
    "guard": _encode_text_or_chat,
}


def _results(
    task: scoring.Task,
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    texts: scoring.Texts,
    answers: tuple[int, ...],
    labels: list[str],
) -> tuple[list[Row], np.ndarray | None]:
    """What is added to each line, and the vectors where there are any."""
    what, size = (model, params, texts), _BATCH_SIZE.value
    match task:
        case "embed":
            vectors = scoring.embed(*what, _DIMENSIONS.value, size)
            return [{"vector": vector.tolist()} for vector in vectors], vectors
        case "rerank":
            scores = scoring.rerank_scores(*what, *answers, size)
            return [{"score": score} for score in scores.tolist()], None
        case "reward":
            scores = scoring.head_scores(*what, size)
            return [{"score": score} for score in scores[:, 0].tolist()], None
        case "step_reward":
            rewards = scoring.step_rewards(*what, *answers, size)
            return [{"scores": row.tolist()} for row in rewards], None
        case "guard":
            of_tokens = zip(texts, scoring.token_scores(*what, size), strict=True)
            return [_judged(model.config, tokenizer, labels, *row) for row in of_tokens], None
    if model.config.head is HeadKind.SCORE_WITH_BIAS:
        of_tokens = zip(texts, scoring.token_scores(*what, size), strict=True)
        return [_of_tokens(tokenizer, labels, ids, scores) for ids, scores in of_tokens], None
    scores = scoring.head_scores(*what, size)
    return [{"scores": _by_name(labels, row)} for row in scores], None


def _of_tokens(tokenizer: Tokenizer, labels: list[str], ids: list[int], scores: np.ndarray) -> Row:
    return {
        "tokens": [tokenizer.decode(token) for token in ids],
        "labels": [labels[best] for best in scores.argmax(axis=1)],
        "scores": [_by_name(labels, row) for row in scores],
    }


def _judged(
    config: ModelConfig, tokenizer: Tokenizer, labels: list[str], ids: list[int], scores: np.ndarray
) -> Row:
    ends = np.cumsum(config.guard.widths)
    parts = [
        (name, slice(end - width, end))
        for name, width, end in zip(_JUDGEMENTS, config.guard.widths, ends.tolist(), strict=True)
    ]
    return {
        "tokens": [tokenizer.decode(token) for token in ids],
        "scores": [{name: _by_name(labels[of], row[of]) for name, of in parts} for row in scores],
    }


def _by_name(labels: list[str], scores: np.ndarray) -> dict[str, float]:
    return dict(zip(labels, scores.tolist(), strict=True))


def _label_names(directory: Path, config: ModelConfig) -> list[str]:
    """As config.json has them, of a guard its four kinds one after another."""
    if config.guard is None:
        return _names_in(directory, "id2label", config.num_labels)
    fields = _JUDGEMENTS.values()
    widths = zip(fields, config.guard.widths, strict=True)
    return [name for field, width in widths for name in _names_in(directory, field, width)]


def _names_in(directory: Path, field: str, count: int) -> list[str]:
    """Names of labels in a field of config.json, else as transformers calls those without."""
    path = directory / "config.json"
    names = read_json_object(path).get(field)
    names = names if isinstance(names, dict) else {}
    labels = [str(names.get(str(i), f"LABEL_{i}")) for i in range(count)]
    label, times = Counter(labels).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{path}: {field} has {times} labels of the name {label!r}, "
            "whose scores could not be told apart; give each its own"
        )
    return labels


if __name__ == "__main__":
    command_line.run(main)
