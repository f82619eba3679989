"""Text that arrives token by token: whole characters only, and nothing of a stop string.

`TextStream` turns ids into text as they come; `StopStrings` holds back what may yet become a stop string.
Both are exact: whatever the split into pieces, the pieces joined equal what one call on the whole would give.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from qwen_jax.errors import QwenJaxError

# No byte-fallback character spans more tokens than UTF-8 has bytes.
_LONGEST_CHARACTER = 4


class TextStream(Protocol):
    """What `Tokenizer.stream` returns. All pieces joined equal `Tokenizer.decode` of all ids."""

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text they complete, "" when they end inside a character."""

    def flush(self) -> str:
        """Ends the text: returns what was held back, U+FFFD for a character that was never completed."""


class ByteStream:
    """The stream of a byte-level vocabulary: an id is a string of bytes, so the work per token is constant.

    Args:
        token_bytes: the bytes of an id; b"" for an id that shows nothing.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """See `TextStream.push`."""
        return self._decoder.decode(b"".join(map(self._token_bytes, ids)))

    def flush(self) -> str:
        """See `TextStream.flush`."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class WindowStream:
    """The stream of any other vocabulary: decodes a short window of ids again for every token.

    The window starts with the ids of the last piece shown, because how a piece is joined (a space, none)
    depends on the one before it. A piece that ends in U+FFFD is held until it changes or is too long to be a
    split character.

    Args:
        decode: text of a list of ids.
        visible: whether an id shows at all; those that do not are dropped.
    """

    def __init__(self, decode: Callable[[list[int]], str], visible: Callable[[int], bool]) -> None:
        self._decode = decode
        self._visible = visible
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """See `TextStream.push`."""
        return "".join(self._push(token) for token in ids if self._visible(token))

    def flush(self) -> str:
        """See `TextStream.flush`."""
        text = self._text()
        self._shown, self._pending = [], []
        return text

    def _push(self, token: int) -> str:
        self._pending.append(token)
        text = self._text()
        if not text or (
            text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < _LONGEST_CHARACTER
        ):
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def _text(self) -> str:
        shown = self._decode(self._shown) if self._shown else ""
        return self._decode(self._shown + self._pending)[len(shown) :] if self._pending else ""


class StopStrings:
    """Ends a text at the first stop string, which is never shown, nor any part of it.

    The first stop string is the one complete first; of two that end at the same character, the longer.

    Args:
        stops: the stop strings; none of them empty. None at all lets everything through at once.

    Attributes:
        hit: the stop string that ended the text, or None so far.

    Raises:
        QwenJaxError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = _checked(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Takes the next piece of text; returns what can be shown so far, "" once a stop string was hit."""
        if self.hit is not None:
            return ""
        text = self._held + text
        found = _first_stop(text, self._stops)
        if found is None:
            cut = len(text) - self._overlap(text)
        else:
            cut, self.hit = found
        self._held = "" if self.hit else text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Ends the text: returns what was held back and did not become a stop string."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to its first stop string (see `StopStrings`), all of it when it holds none.

    Raises:
        QwenJaxError: a stop string is empty.
    """
    found = _first_stop(text, _checked(stops))
    return text if found is None else text[: found[0]]


def _checked(stops: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stops, str):
        stops = (stops,)
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise QwenJaxError(f"a stop string must be a text that is not empty, got {tuple(stops)!r:.80}")
    return tuple(stops)


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(start, stop string) of the stop string that is complete first."""
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1:] if found else None
