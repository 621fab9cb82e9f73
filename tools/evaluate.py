"""Measures how good a model is: on a text, on tasks, on the embedded model's own problems.

    python -m tools.evaluate --model=DIR --workdir=results --text=book.txt --stride=512
    python -m tools.evaluate --model=DIR --workdir=results --tasks=arc_easy,gsm8k --limit=200
    python -m tools.evaluate --model=DIR --workdir=results --tasks=mine --task_path=my_tasks --chat
    python -m tools.evaluate --model=DIR --workdir=results --problems=100
    python -m tools.evaluate --model=DIR --workdir=results --text=book.txt --cache_dtype=int8

* --text: perplexity, nats per token and bits per byte, in windows of --length tokens, each --stride
  further on than the one before; every token is predicted once, from what its window has before it.
  With --cache_dtype=int8 also how far such a cache moves the predictions: KL(full || int8), mean
  and largest, how often the likeliest token is the same, and what is left of the cache's size.
* --tasks: tasks of lm-evaluation-harness (pip install lm-eval), its own or those of --task_path.
* --problems: so many held-out problems of each kind, with thinking and without, and where a
  calculator could help, whether it is called as it should be.

--cache_dtype=int8 is also what answers to --tasks and --problems are written with.

Tables are printed. Every number goes to WORKDIR/evaluate.jsonl with what it was made with, and to
evaluate.csv, after those of earlier runs; what the last run's model answered is in samples.jsonl
(tasks) and answers.jsonl (problems), and problems.png shows the problems by kind.
"""

from absl import flags

from qwen_jax.errors import UserError
from qwen_jax.evaluation.harness import HarnessOptions
from qwen_jax.evaluation.run import EvaluateOptions, Subject, check_options, evaluate
from qwen_jax.provenance import provenance
from tools import cache_flag, command_line, mesh_flag, model_flags, weights_flag

_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go.", required=True)
_TEXT = flags.DEFINE_string("text", None, "A text file to predict.")
_LENGTH = flags.DEFINE_integer(
    "length",
    None,
    "With --text and --tasks: tokens that the model reads at once; its positions if not given, of "
    "a text at most 2048.",
    lower_bound=2,
)
_STRIDE = flags.DEFINE_integer(
    "stride", None, "With --text: from one window to the next; half the length if not given.", 1
)
_ALLOW_SPECIAL = flags.DEFINE_bool(
    "allow_special", False, "With --text: control tokens in it count; otherwise they are text."
)
_ALLOW_LONGER = flags.DEFINE_bool(
    "allow_longer", False, "Accept a --length of more than the model's positions."
)
_TASKS = flags.DEFINE_list("tasks", [], "Names of tasks, groups or tags, such as arc_easy,gsm8k.")
_TASK_PATH = flags.DEFINE_string("task_path", None, "With --tasks: a directory of task files.")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "With --tasks: so many documents of each, for a first look.", lower_bound=1
)
_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot",
    None,
    "With --tasks: examples before each question; the task's own number if not given.",
    lower_bound=0,
)
_CHAT = flags.DEFINE_bool("chat", False, "With --tasks: ask through the chat template.")
_THINKING = flags.DEFINE_bool(
    "thinking", None, "With --chat: the template's enable_thinking; its default if not given."
)
_PROBLEMS = flags.DEFINE_integer(
    "problems", 0, "Held-out problems of each kind; 0 for none.", lower_bound=0
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 256, "With --problems: of an answer; longer ones are wrong.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Texts that run together.", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Of the problems, of examples before questions, and of what tasks sample.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
# Which flag is for which: given without it, one of them would change nothing.
_NEEDS = (
    ("text", _STRIDE, _ALLOW_SPECIAL),
    ("text or --tasks", _LENGTH, _ALLOW_LONGER),
    ("tasks", _TASK_PATH, _LIMIT, _FEWSHOT, _CHAT),
    ("chat", _THINKING),
    ("problems", _MAX_NEW_TOKENS),
)
_FLAGS = (
    model_flags.MODEL, model_flags.DTYPE, model_flags.ROPE, weights_flag.WEIGHTS, mesh_flag.MESH,
    _TEXT, _LENGTH, _STRIDE, _ALLOW_SPECIAL, _ALLOW_LONGER, _TASKS, _TASK_PATH, _LIMIT, _FEWSHOT,
    _CHAT, _THINKING, _PROBLEMS, _MAX_NEW_TOKENS, _BATCH_SIZE, _SEED, cache_flag.CACHE_DTYPE,
)  # fmt: skip


def main() -> None:
    """Checks the flags, loads the model, measures, prints the tables."""
    workdir = command_line.path(_WORKDIR)
    options = _options()
    check_options(options, workdir)
    loaded = model_flags.load_model()
    origin = provenance(
        loaded.params["embed_tokens"]["weight"].dtype.name,
        {flag.name: flag.value for flag in _FLAGS},
        also=("lm_eval",) if _TASKS.value else (),
    )
    subject = Subject(
        model_flags.MODEL.value,
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        loaded.defaults.options,
        loaded.stop_ids,
    )
    print(evaluate(subject, options, workdir, origin))


def _options() -> EvaluateOptions:
    asked = {
        "text": _TEXT.value is not None,
        "tasks": bool(_TASKS.value),
        "text or --tasks": _TEXT.value is not None or bool(_TASKS.value),
        "chat": _CHAT.value,
        "problems": bool(_PROBLEMS.value),
    }
    if any(asked.values()):
        for needed, *others in _NEEDS:
            for flag in others:
                if flags.FLAGS[flag.name].present and not asked[needed]:
                    raise UserError(f"--{flag.name} needs --{needed}")
    harness = None
    if _TASKS.value:
        harness = HarnessOptions(
            tasks=tuple(_TASKS.value),
            task_path=None if _TASK_PATH.value is None else command_line.path(_TASK_PATH),
            limit=_LIMIT.value,
            num_fewshot=_FEWSHOT.value,
            chat=_CHAT.value,
        )
    return EvaluateOptions(
        text=None if _TEXT.value is None else command_line.path(_TEXT),
        length=_LENGTH.value,
        stride=_STRIDE.value,
        allow_special=_ALLOW_SPECIAL.value,
        allow_longer=_ALLOW_LONGER.value,
        harness=harness,
        thinking=_THINKING.value,
        problems=_PROBLEMS.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
        cache_dtype=cache_flag.CACHE_DTYPE.value,
    )


if __name__ == "__main__":
    command_line.run(main)
