"""Text while it is generated: whole characters only, and an end at the first stop string."""

import codecs
from collections.abc import Callable, Iterable

from qwen_jax.errors import UserError


class StreamDecoder:
    """Turns token ids into text as they come.

    `push` returns text that later ids can't change: the bytes of an unfinished character are held
    back until they are complete or turn out invalid (then U+FFFD, as in a whole decode). What all
    pushes and `finish` return, joined, is `tokenizer.decode` of all ids. The cost of a token
    doesn't grow with what came before.

    Args:
      bytes_of: the bytes of a token id, empty where it has no text.
      errors: what becomes of bytes that are not UTF-8, see `Spelling`.
      drops_first_space: whether a space at the beginning is left out.
    """

    def __init__(
        self,
        bytes_of: Callable[[int], bytes],
        errors: str = "replace",
        drops_first_space: bool = False,
    ):
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._drops_first_space = self._is_first = drops_first_space

    def push(self, ids: int | Iterable[int]) -> str:
        """Takes the next id or ids and returns the text that has become final."""
        ids = ids if isinstance(ids, Iterable) else (ids,)
        return self._shown(self._decoder.decode(b"".join(self._bytes_of(int(i)) for i in ids)))

    def finish(self) -> str:
        """Returns what is still held back; the decoder can then start on a new text."""
        text = self._shown(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._is_first = self._drops_first_space
        return text

    def _shown(self, text: str) -> str:
        if self._is_first and text:
            self._is_first = False
            return text.removeprefix(" ")
        return text


class StopStrings:
    """Cuts streamed text before the first stop string.

    Of all occurrences the one that starts first counts, and of two that start together the shorter
    one, however the text is cut into pushes. Text that may still become part of that occurrence is
    held back, at most the length of the longest stop string. (Among stops "xab" and "a", the text
    "xa" is undecided: "a" is matched only once "xab" has failed.)

    Args:
      stops: the stop strings; none of them may be empty.

    Attributes:
      matched: the stop string that was found, else None.

    Raises:
      UserError: a stop string is empty or isn't a string.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise UserError(f"stop strings must be non-empty text, found {stop!r}")
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Takes more text and returns what is certain to stand before the first stop string."""
        if self.matched is not None:
            return ""
        text = self._held + text
        match = self._first_match(text)
        undecided = self._first_undecided(text)
        if match is not None and match[0] <= undecided:
            return self._stop_at(text, *match)
        self._held = text[undecided:]
        return text[:undecided]

    def finish(self) -> str:
        """The text has ended: returns what is held back, up to a stop string in it."""
        if self.matched is not None:
            return ""
        match = self._first_match(self._held)
        if match is not None:
            return self._stop_at(self._held, *match)
        text, self._held = self._held, ""
        return text

    def _stop_at(self, text: str, start: int, stop: str) -> str:
        self.matched, self._held = stop, ""
        return text[:start]

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = [(text.find(stop), stop) for stop in self._stops]
        return min(
            ((start, stop) for start, stop in found if start >= 0),
            key=lambda match: (match[0], len(match[1])),
            default=None,
        )

    def _first_undecided(self, text: str) -> int:
        """Where the longest tail starts that is the beginning, not the whole, of a stop string."""
        first = len(text)
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    first = min(first, len(text) - length)
                    break
        return first
