"""Pass key retrieval: a long text of made-up words, named keys hidden in it, and a question about one of them.

    qob idzwr The pass key of Ravoti is 48213. mwpe 90221 kafy ... kzv
    The pass key of Ravoti is

The other keys, and numbers strewn about, are there to be confused with the answer. One token is one byte: the
shipped checkpoint's tokenizer gives byte b the id b, so a text has as many tokens as bytes and its length is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from qwen_jax.errors import QwenJaxError

DIGITS = 5
END_OF_TEXT = 256  # <|endoftext|>: the special tokens stand behind the 256 bytes
IM_START, IM_END, PAD = 257, 258, 259
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_SYLLABLES = 3
_CONSONANTS = np.frombuffer(b"bdfgklmnprstvz", np.uint8)
_VOWELS = np.frombuffer(b"aeiou", np.uint8)
_STATEMENT = "The pass key of {name} is "
TOKENS_PER_NUMBER = 100.0


@dataclasses.dataclass(frozen=True)
class Key:
    """One named key: `name` is asked for, `digits` is the answer."""

    name: str
    digits: str

    def needle(self) -> bytes:
        """The sentence as it is hidden in the text."""
        return f" {_STATEMENT.format(name=self.name)}{self.digits}. ".encode()

    def question(self) -> bytes:
        """The line that asks for the key; the answer is `digits` and nothing before it."""
        return f"\n{_STATEMENT.format(name=self.name)}".encode()


@dataclasses.dataclass(frozen=True)
class Task:
    """One text with its question.

    Attributes:
        text: ASCII, as many characters as tokens, question included.
        asked: the key asked for.
        others: the decoys, in the order in which they stand in the text.
        start: offset of the asked needle in the text, tokens.
    """

    text: str
    asked: Key
    others: tuple[Key, ...]
    start: int

    @property
    def ids(self) -> np.ndarray:
        """The text as token ids, int32[T]."""
        return np.frombuffer(self.text.encode(), np.uint8).astype(np.int32)

    def is_answer(self, answer: str) -> bool:
        """True if a generated answer starts with the key and is not a longer number."""
        answer = answer.strip()
        return answer.startswith(self.asked.digits) and not answer[DIGITS : DIGITS + 1].isdigit()


def make_task(rng: np.random.Generator, length: int, depth: float, keys: int = 4) -> Task:
    """Writes one text of exactly `length` tokens.

    Args:
        rng: the only source of chance: the same generator state gives the same task.
        length: tokens of text and question together.
        depth: where the asked key stands, from 0 (at the very start) to 1 (right before the question).
        keys: named keys in the text, the asked one included.

    Raises:
        QwenJaxError: depth outside [0, 1], no key, or a length too short to hold the keys and the question.
    """
    if not 0 <= depth <= 1:
        raise QwenJaxError(f"pass key depth must lie between 0 and 1, got {depth}")
    asked, *others = named_keys(rng, keys)
    question, needle = asked.question(), asked.needle()
    body = length - len(question)
    shortest = sum(len(key.needle()) for key in (asked, *others)) + len(question)
    # Twice the needles leave room for the decoys on either side, whatever the depth.
    if length < 2 * shortest:
        raise QwenJaxError(
            f"a pass key text with {keys} keys needs at least {2 * shortest} tokens, got {length}"
        )
    start = round(depth * (body - len(needle)))
    text = filler(rng, body)
    while asked.digits.encode() in text.tobytes():
        text = filler(rng, body)
    write(text, start, needle)
    before = [key for key in others if rng.random() < start / body]
    while sum(len(key.needle()) for key in before) > start:
        before.pop()
    after = [key for key in others if key not in before]
    end = start + len(needle)
    while sum(len(key.needle()) for key in after) > body - end:
        before.append(after.pop())
    scatter(rng, text[:start], before)
    scatter(rng, text[end:], after)
    whole = text.tobytes() + question
    return Task(whole.decode(), asked, tuple(before + after), start)


def named_keys(rng: np.random.Generator, count: int) -> list[Key]:
    """`count` keys with distinct digits (uniform in 10000..99999) and names with distinct first letters.

    Raises:
        QwenJaxError: count is not in 1..14.
    """
    if not 1 <= count <= len(_CONSONANTS):
        raise QwenJaxError(f"a pass key text holds 1 to {len(_CONSONANTS)} keys, got {count}")
    letters = np.empty((count, _SYLLABLES, 2), np.uint8)
    letters[..., 0] = _CONSONANTS[rng.integers(0, len(_CONSONANTS), (count, _SYLLABLES))]
    letters[..., 1] = _VOWELS[rng.integers(0, len(_VOWELS), (count, _SYLLABLES))]
    letters[:, 0, 0] = _CONSONANTS[rng.permutation(len(_CONSONANTS))[:count]]
    numbers = rng.integers(10 ** (DIGITS - 1), 10**DIGITS, count)
    while len(set(numbers.tolist())) < count:
        numbers = rng.integers(10 ** (DIGITS - 1), 10**DIGITS, count)
    return [
        Key(row.tobytes().decode().capitalize(), str(number))
        for row, number in zip(letters, numbers, strict=True)
    ]


def filler(rng: np.random.Generator, length: int, every: float = TOKENS_PER_NUMBER) -> np.ndarray:
    """Made-up lower-case words of 2 to 8 letters, a five-digit number in about `every` tokens among them, uint8[length]."""
    text = rng.integers(ord("a"), ord("z") + 1, length, dtype=np.uint8)
    ends = np.cumsum(rng.integers(3, 10, length // 3 + 1)) - 1
    text[ends[ends < length]] = ord(" ")
    width = DIGITS + 2
    count = rng.binomial(length, 1 / every) if length >= width else 0
    if count:
        numbers = np.full((count, width), ord(" "), np.uint8)
        numbers[:, 1:-1] = rng.integers(ord("0"), ord("9") + 1, (count, DIGITS), dtype=np.uint8)
        # On a grid, so that no number overwrites a part of another and makes a shorter or longer one.
        cells = rng.permutation(length // width)[:count]
        offset = rng.integers(0, length % width + 1)
        text[(offset + cells * width)[:, None] + np.arange(width)] = numbers[: len(cells)]
    return text


def scatter(rng: np.random.Generator, text: np.ndarray, keys: Sequence[Key]) -> None:
    """Writes the needles into `text` in the given order, at random places that do not overlap."""
    needles = [key.needle() for key in keys]
    room = len(text) - sum(map(len, needles))
    starts = np.sort(rng.integers(0, room + 1, len(needles))) + np.cumsum([0, *map(len, needles)])[:-1]
    for start, needle in zip(starts, needles, strict=True):
        write(text, int(start), needle)


def write(text: np.ndarray, start: int, needle: bytes) -> None:
    """Overwrites `text` uint8[T] with the needle from `start` on."""
    text[start : start + len(needle)] = np.frombuffer(needle, np.uint8)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Right answers over length x depth.

    Attributes:
        lengths: tokens, one a row.
        depths: 0..1, one a column.
        trials: tasks a cell.
        correct: int64[len(lengths), len(depths)], tasks answered right.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    correct: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """Share of right answers a cell, float64[lengths, depths]."""
        return self.correct / self.trials

    def by_length(self) -> dict[int, float]:
        """Share of right answers at each length, over all depths."""
        return dict(zip(self.lengths, self.accuracy.mean(axis=1).tolist(), strict=True))


def grid_tasks(length: int, depths: Sequence[float], trials: int, seed: int) -> list[Task]:
    """The tasks of one row of the grid, depth by depth; each depends on (seed, length, its index) alone."""
    return [
        make_task(np.random.default_rng((seed, length, column, trial)), length, depth)
        for column, depth in enumerate(depths)
        for trial in range(trials)
    ]


def evaluate(
    answer: Callable[[Sequence[Task]], Sequence[str]],
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    *,
    seed: int = 0,
    batch: int = 1,
    report: Callable[[int, int, int], None] | None = None,
) -> Grid:
    """Asks `trials` tasks at every length and depth and counts right answers.

    Args:
        answer: continues each of up to `batch` tasks of one length; `Task.is_answer` judges the texts it returns.
        lengths: tokens, question included.
        depths: 0..1.
        trials: tasks a cell; the table's figure for a length rests on len(depths) * trials of them.
        seed: the same seed asks the same tasks.
        batch: most tasks in one call of `answer`.
        report: called after each batch with (length, tasks done at this length, right answers among them).
    """
    correct = np.zeros((len(lengths), len(depths)), np.int64)
    for row, length in enumerate(lengths):
        tasks = grid_tasks(length, depths, trials, seed)
        right: list[bool] = []
        for first in range(0, len(tasks), batch):
            group = tasks[first : first + batch]
            right += [task.is_answer(text) for task, text in zip(group, answer(group), strict=True)]
            if report:
                report(length, len(right), sum(right))
        correct[row] = np.reshape(right, (len(depths), trials)).sum(axis=1)
    return Grid(tuple(lengths), tuple(depths), trials, correct)
