"""The flags of command lines that guess tokens ahead, and what guessed well is told by."""

import sys

from absl import flags

import qwen_jax
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config
from qwen_jax.inference.checks import check_writes_text
from qwen_jax.inference.drafting import Drafter, DraftModel, MtpDraft, PromptLookup
from qwen_jax.inference.speculation import Counts
from qwen_jax.models.decoder import Decoder
from qwen_jax.text import Tokenizer
from tools import mesh_flag

SPECULATE = flags.DEFINE_enum(
    "speculate",
    None,
    ["lookup", "mtp", "draft"],
    "Guess several tokens and verify them in one pass: lookup repeats what followed earlier in the "
    "text, mtp asks the model's own head, draft asks --draft_model. Texts stay the same if greedy, "
    "else as likely.",
)
DRAFT_MODEL = flags.DEFINE_string(
    "draft_model", None, "With --speculate=draft: a smaller checkpoint of the same vocabulary."
)
DRAFT_TOKENS = flags.DEFINE_integer(
    "draft_tokens",
    None,
    "With --speculate: tokens of a guess; 8 of lookup, 4 of draft, 2 of mtp if not given.",
    lower_bound=1,
)


def check_flags() -> None:
    """Refuses what would change nothing, or cannot be, before anything is loaded.

    Raises:
      UserError: a flag that needs another.
    """
    if DRAFT_TOKENS.value is not None and SPECULATE.value is None:
        raise UserError("--draft_tokens needs --speculate")
    if (DRAFT_MODEL.value is not None) != (SPECULATE.value == "draft"):
        raise UserError("--draft_model and --speculate=draft need each other")
    if SPECULATE.value is not None and mesh_flag.MESH.value is not None:
        raise UserError("--speculate runs on one device; leave out --mesh")


def load_drafter(
    kind: str | None, model: Decoder, tokenizer: Tokenizer, dtype: str | None
) -> Drafter | None:
    """A drafter of a kind, as the flags have it, checked against the model; None for no kind.

    Args:
      kind: as --speculate has them.
      model, tokenizer: that it drafts for.
      dtype: of the draft model's parameters; None as for the model.

    Raises:
      UserError: the model has no such head, or whatever is wrong with the draft model.
    """
    given = {} if DRAFT_TOKENS.value is None else {"tokens": DRAFT_TOKENS.value}
    match kind:
        case None:
            return None
        case "lookup":
            return PromptLookup(**given)
        case "mtp":
            drafter = MtpDraft(**given)
        case "draft":
            drafter = _load_draft_model(model, tokenizer, dtype, given)
    drafter.check(model)
    return drafter


def _load_draft_model(
    target: Decoder, tokenizer: Tokenizer, dtype: str | None, given: dict[str, int]
) -> DraftModel:
    named = f"--draft_model={DRAFT_MODEL.value}"
    directory = resolve_source(DRAFT_MODEL.value)
    try:
        check_writes_text(load_config(directory))
    except UserError as error:
        raise UserError(f"{named}: {error}") from None
    if not qwen_jax.load_tokenizer(directory).has_vocabulary_of(tokenizer):
        raise UserError(
            f"{named}: its tokenizer has other tokens than the model's; draft with a model of the "
            "same vocabulary"
        )
    model, params = qwen_jax.load_pretrained(directory, dtype)
    # Tables are padded to round numbers, which differ from model to model.
    is_same = model.config.vocab_size == target.config.vocab_size
    return DraftModel(params, model, num_ids=None if is_same else tokenizer.max_id + 1, **given)


def report(counts: Counts) -> None:
    """Says on stderr how well was guessed."""
    print(
        f"speculation: {counts.accepted} of {counts.drafted} drafted tokens stood "
        f"({counts.acceptance:.1%}), {counts.tokens_per_pass:.2f} tokens a pass",
        file=sys.stderr,
    )
