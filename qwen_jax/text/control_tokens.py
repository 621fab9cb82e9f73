"""Keeps control tokens that stand in a user's words from becoming control ids.

A chat is rendered to text before it is tokenised, so a user who writes <|im_end|> could end his own
turn. Two private-use characters tell apart who wrote a control token:

* the *breaker* is put into every added token of the user's strings, after its first character. The
  template's own tests (`'</think>' in content`) don't see such a token either. A string that ends
  with the beginning of an added token, or begins with the end of one, gets a breaker at that edge,
  so that two strings can't join to a token.
* the *stamp* is put likewise into the added tokens that the template writes to its output as they
  stand in its text. Only stamped tokens count, so neither replacing nor cutting nor joining of
  broken strings forges one.

A template also may write tokens in ways that can't be stamped, as from a variable or an argument of
a function: those count unstamped, and only those that the template's text has in such a place. If
the stamps change what the template writes, it is rendered without them, and every added token in
its text counts unstamped. A token that a template glues from pieces (`'<|' ~ name ~ '|>'`) never
counts: it can't be told from one that a user glues. Both characters are gone before anything is
encoded.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes

from qwen_jax.errors import UserError
from qwen_jax.text.tokenizer_config import AddedToken

_PRIVATE_USE = range(0xE000, 0xF900)


@dataclasses.dataclass(frozen=True)
class Marks:
    """Two characters that occur nowhere in a conversation and its template, see the module."""

    breaker: str
    stamp: str


def choose_marks(texts: Iterable[str]) -> Marks:
    r"""Two private-use characters of which no text holds the character or its \u escape.

    Raises:
      UserError: the texts use all 6,400 of them.
    """
    joined = "\n".join(texts)
    lowered = joined.lower()
    free = (
        chr(code)
        for code in _PRIVATE_USE
        if chr(code) not in joined and f"u{code:04x}" not in lowered
    )
    try:
        return Marks(breaker=next(free), stamp=next(free))
    except StopIteration:
        raise UserError(
            "messages: hold every private-use character U+E000 to U+F8FF;"
            " remove some or pass allow_special=True"
        ) from None


def strings_in(value: Any) -> Iterator[str]:
    """Every string in nested dicts, lists and tuples, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


@dataclasses.dataclass(frozen=True)
class Breaker:
    """Breaks the given tokens in strings.

    Attributes:
      tokens: surface forms to break.
      mark: the character to break them with.
    """

    tokens: tuple[str, ...]
    mark: str

    def __post_init__(self):
        edges = [(token[:n], token[n:]) for token in set(self.tokens) for n in range(1, len(token))]
        starts = _longest_first({start for start, _ in edges})
        ends = _longest_first({end for _, end in edges})
        # Overlapping occurrences are all found: the rest of a token is only looked at.
        whole = "|".join(
            f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in _longest_first(set(self.tokens))
        )
        object.__setattr__(self, "_whole", re.compile(whole or "(?!)"))
        object.__setattr__(self, "_start", re.compile(f"(?:{_either(ends)})"))
        object.__setattr__(self, "_end", re.compile(f"(?:{_either(starts)})\\Z"))
        object.__setattr__(self, "_reach", max((len(t) for t in self.tokens), default=0))

    def __call__(self, value: Any) -> Any:
        """`value` with every string in it broken, keys included."""
        if isinstance(value, str):
            return self._break(value)
        if isinstance(value, Mapping):
            return {self._break_key(key): self(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self(item) for item in value)
        return value

    def _break_key(self, key: Any) -> Any:
        return self._break(key) if isinstance(key, str) else key

    def _break(self, text: str) -> str:
        broken = self._whole.sub(lambda match: match.group() + self.mark, text)
        if self._start.match(text):
            broken = self.mark + broken
        if self._end.search(text, max(0, len(text) - self._reach)):
            broken += self.mark
        return broken


def _longest_first(texts: Collection[str]) -> list[str]:
    return sorted(texts, key=lambda text: (-len(text), text))


def _either(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, texts)) or "(?!)"


def stamp_template(tree: nodes.Template, tokens: Collection[str], stamp: str) -> frozenset[str]:
    """Stamps, in place, the tokens that the tree writes out, and returns those it can't stamp.

    With an empty `stamp` nothing changes, and all tokens of the template's text are returned.
    """
    stamped: set[int] = set()
    if stamp:
        for output in tree.find_all(nodes.Output):
            for node in output.nodes:
                stamped |= _stamp(node, tokens, stamp)
    return frozenset(
        token
        for node in tree.find_all((nodes.TemplateData, nodes.Const))
        if id(node) not in stamped
        for token in tokens
        if token in str(getattr(node, "data", getattr(node, "value", "")))
    )


def _stamp(node: nodes.Node, tokens: Collection[str], stamp: str) -> set[int]:
    """Follows only what reaches the output unread by the template, and returns what was stamped."""
    if isinstance(node, nodes.TemplateData):
        node.data = _with_stamps(node.data, tokens, stamp)
        return {id(node)}
    if isinstance(node, nodes.Const):
        if isinstance(node.value, str):
            node.value = _with_stamps(node.value, tokens, stamp)
        return {id(node)}
    if isinstance(node, nodes.Add):
        parts = [node.left, node.right]
    elif isinstance(node, nodes.Concat):
        parts = node.nodes
    elif isinstance(node, nodes.CondExpr):
        parts = [part for part in (node.expr1, node.expr2) if part is not None]
    else:
        parts = []
    return set().union(*(_stamp(part, tokens, stamp) for part in parts))


def _with_stamps(text: str, tokens: Collection[str], stamp: str) -> str:
    pattern = _either(_longest_first(tokens))
    return re.sub(pattern, lambda m: m.group()[0] + stamp + m.group()[1:], text)


def tokens_in_variables(
    tree: nodes.Template, variables: Mapping[str, str], tokens: Collection[str]
) -> frozenset[str]:
    """Tokens in those of the variables (eos_token and the like) that the template reads."""
    read = {name.name for name in tree.find_all(nodes.Name)}
    return frozenset(
        token
        for name, value in variables.items()
        if name in read
        for token in tokens
        if token in value
    )


def encode_marked(
    text: str,
    added_tokens: Collection[AddedToken],
    unstamped: Collection[str],
    marks: Marks,
    encode_plain: Callable[..., list[int]],
) -> list[int]:
    """Ids of a rendered chat in which only the template's control tokens count.

    Args:
      text: the rendered chat with marks.
      added_tokens: the tokenizer's added tokens.
      unstamped: surface forms that count without a stamp.
      marks: the characters in it.
      encode_plain: ids of text that holds no control tokens; with continues=True those of text
        behind a control token.
    """
    by_content = {token.content: token for token in added_tokens}
    choices = []
    for content in _longest_first(by_content):
        token, stamp = by_content[content], re.escape(marks.stamp)
        stamp += "?" if content in unstamped else ""
        body = re.escape(content[0]) + stamp + re.escape(content[1:])
        if token.single_word:
            body = rf"(?<!\w){body}(?!\w)"
        choices.append((r"\s*" if token.lstrip else "") + body + (r"\s*" if token.rstrip else ""))
    finder = re.compile("|".join(choices) or "(?!)")
    ids: list[int] = []
    position = 0
    for match in finder.finditer(text):
        ids += _encode_segment(text[position : match.start()], marks, encode_plain, position > 0)
        surface = match.group().replace(marks.stamp, "")
        token = by_content.get(surface) or by_content[surface.strip()]
        ids.append(token.id)
        position = match.end()
    return ids + _encode_segment(text[position:], marks, encode_plain, position > 0)


def _encode_segment(
    text: str, marks: Marks, encode_plain: Callable[..., list[int]], continues: bool
) -> list[int]:
    text = without_marks(text, marks)
    return encode_plain(text, continues=continues) if text else []


def without_marks(text: str, marks: Marks) -> str:
    r"""The text as it is without marks, also where JSON or repr wrote a mark as a \u escape."""
    for mark in (marks.breaker, marks.stamp):
        text = text.replace(mark, "").replace(f"\\u{ord(mark):04x}", "")
    return text
