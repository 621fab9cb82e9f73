"""Which tokens of a conversation are learned, found in the ids of one rendering of all of it.

Rendering the conversation turn by turn and taking differences would drift from the text that the
model sees: templates leave out the thinking of earlier turns, and write several answers of tools as
one turn. Here the turns are read from the ids, where only the template can write control tokens,
and held against the messages one by one.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer
from qwen_jax.training.data.options import TokenOptions

_NAMES = {"tool": ("tool", "user")}


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn as the template wrote it.

    Attributes:
      role: the first line's text.
      start: where its words begin in the ids.
      end: behind its `<|im_end|>`.
    """

    role: str
    start: int
    end: int


def learned_tokens(
    ids: Sequence[int],
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    options: TokenOptions,
    given: int = 0,
) -> np.ndarray:
    """Which of a rendered conversation's tokens are learned: bool [T].

    Learned are the words of the chosen roles and the `<|im_end|>` behind them; not the line that
    names the role, which a prompt ends with, nor the line end behind the turn. An empty block of
    thinking is not learned either: it is how a prompt asks for an answer without any. A block that
    is left out goes with the white space around it.

    Args:
      ids: of the whole conversation, from the checkpoint's template.
      messages: of the conversation.
      tokenizer: that made the ids.
      options: what is learned.
      given: how many messages at the start are a prompt, of which nothing is learned; the one
        behind them begins a turn of its own.

    Raises:
      UserError: the template does not write turns as Qwen's do, or not those of the messages;
        a block is not closed; or no turn is learned.
    """
    turns = find_turns(ids, tokenizer)
    roles = _roles_of_turns(turns, messages)
    first = len(turns) - len(_turns(messages[given:])) if given else 0
    chosen = [i for i, role in enumerate(roles) if role in options.learn and i >= first]
    if not chosen:
        raise UserError(
            f"messages: there is no turn of {' or '.join(options.learn)}, so nothing is learned; "
            "leave the conversation out, or change learn"
        )
    if options.last_turn_only:
        chosen = chosen[-1:]
    learned = np.zeros(len(ids), bool)
    for i in chosen:
        turn = turns[i]
        learned[turn.start : turn.end] = True
        if roles[i] == "assistant":
            for start, end in _left_out(ids, turn, tokenizer, options):
                learned[start:end] = False
    return learned


def find_turns(ids: Sequence[int], tokenizer: Tokenizer) -> list[Turn]:
    """The turns of a rendered conversation, from `<|im_start|>` to `<|im_end|>`.

    Raises:
      UserError: the tokenizer has no such tokens, or the template leaves a turn open.
    """
    opening, closing = _id(tokenizer, "<|im_start|>"), _id(tokenizer, "<|im_end|>")
    turns = []
    position = 0
    while (opened := _index(ids, opening, position)) is not None:
        end = _index(ids, closing, opened)
        following = _index(ids, opening, opened + 1)
        if end is None or (following is not None and following < end):
            raise UserError(
                f"messages: turn {len(turns)} of the rendered conversation has no <|im_end|>; the "
                "loss of such a template's chats cannot be told by roles"
            )
        start = opened + 1
        role = ""
        while start < end and "\n" not in role:
            start += 1
            role = tokenizer.decode(ids[opened + 1 : start])
        turns.append(Turn(role.partition("\n")[0], start, end + 1))
        position = end + 1
    return turns


def _roles_of_turns(turns: Sequence[Turn], messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whose words each turn holds; answers of tools that follow each other share a turn."""
    roles = _turns(messages)
    written = [turn.role for turn in turns]
    # Templates put a system prompt of their own where there is none.
    if roles[0] != "system" and written[:1] == ["system"]:
        roles = ["system", *roles]
    fits = len(roles) == len(written) and all(
        name in _NAMES.get(role, (role,)) for role, name in zip(roles, written, strict=True)
    )
    if not fits:
        raise UserError(
            f"messages: the template wrote the turns {', '.join(written) or 'none'} for messages "
            f"of {', '.join(message['role'] for message in messages)}; the loss cannot be told by "
            "roles"
        )
    return roles


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The roles of the turns that a template makes of messages."""
    roles: list[str] = []
    for role, run in itertools.groupby(message["role"] for message in messages):
        roles += [role] if role == "tool" else run
    return roles


def _left_out(
    ids: Sequence[int], turn: Turn, tokenizer: Tokenizer, options: TokenOptions
) -> list[tuple[int, int]]:
    """The spans of an assistant's turn that are not learned."""
    last = turn.end - 1
    thinking = _thinking(ids, turn, tokenizer, needed=not options.thinking)
    spans = []
    if thinking is not None and (not options.thinking or _is_empty(ids, thinking, tokenizer)):
        spans.append(thinking)
    if not options.tool_calls:
        opening, closing = _id(tokenizer, "<tool_call>"), _id(tokenizer, "</tool_call>")
        position = turn.start if thinking is None else thinking[1]
        while (opened := _index(ids, opening, position, last)) is not None:
            closed = _index(ids, closing, opened, last)
            if closed is None:
                raise UserError("messages: an assistant's <tool_call> is not closed; close it")
            spans.append((opened, closed + 1))
            position = closed + 1
    return [_with_white_space(ids, span, turn, tokenizer) for span in spans]


def _thinking(
    ids: Sequence[int], turn: Turn, tokenizer: Tokenizer, needed: bool
) -> tuple[int, int] | None:
    """The thinking that a turn begins with, its tokens included; None if it has none."""
    if "<think>" not in tokenizer.added_tokens and not needed:
        return None
    opening, closing = _id(tokenizer, "<think>"), _id(tokenizer, "</think>")
    last = turn.end - 1
    begins = turn.start
    while begins < last and tokenizer.decode(ids[begins]).isspace():
        begins += 1
    closed = _index(ids, closing, turn.start, last)
    if ids[begins] != opening:
        if closed is not None and needed:
            raise UserError("messages: an assistant's </think> has no <think> before it; add it")
        return None
    if closed is None:
        if needed:
            raise UserError("messages: an assistant's <think> is not closed; close it")
        return None
    return begins, closed + 1


def _is_empty(ids: Sequence[int], thinking: tuple[int, int], tokenizer: Tokenizer) -> bool:
    start, end = thinking
    return not tokenizer.decode(ids[start + 1 : end - 1]).strip()


def _with_white_space(
    ids: Sequence[int], span: tuple[int, int], turn: Turn, tokenizer: Tokenizer
) -> tuple[int, int]:
    start, end = span
    while start > turn.start and tokenizer.decode(ids[start - 1]).isspace():
        start -= 1
    while end < turn.end - 1 and tokenizer.decode(ids[end]).isspace():
        end += 1
    return start, end


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.added_tokens.get(token)
    if found is None:
        raise UserError(
            f"the tokenizer has no token {token}, by which parts of a chat are told apart; take "
            "another checkpoint's tokenizer, or learn from texts"
        )
    return found


def _index(ids: Sequence[int], token: int, start: int, end: int | None = None) -> int | None:
    try:
        return ids.index(token, start, len(ids) if end is None else end)
    except ValueError:
        return None
