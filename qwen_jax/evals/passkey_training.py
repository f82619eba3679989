"""Training sequences for the shipped checkpoint: pass key texts that ask for every key, and texts that repeat themselves.

Both are needed: a model learns to copy from the repetitions first, and then whom to copy from the questions.
"""

from __future__ import annotations

import numpy as np

from qwen_jax.evals.passkey import DIGITS, END_OF_TEXT, PAD, TOKENS_PER_NUMBER, filler, named_keys, scatter

SHORTEST = 96  # tokens: room for one key and its question
FULL_LENGTH_SHARE = 0.75
REPETITION_SHARE = 0.2
MOST_KEYS, MOST_QUESTIONS = 8, 4
FILLER_WEIGHT, COPY_WEIGHT, END_WEIGHT = 0.02, 1.0, 1.0
FIRST_DIGIT_WEIGHT, DIGIT_WEIGHT = 20.0, 10.0  # the first digit is the choice of a key, the others only copy
# Numbers stand closer here than in the texts asked about later: a short text then holds as many decoys as a long one.
DENSEST_NUMBERS = 12.0  # tokens a number
_TOKENS_PER_KEY = 80  # needle, question and some filler between


def step_batch(seed: int, step: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The `batch` of one training step, whoever makes it and whenever."""
    return batch(np.random.default_rng((seed, step)), rows, length)


def batch(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded sequences: ids uint16[rows, length] and the weight of each as a target, float16[rows, length]."""
    ids = np.full((rows, length), PAD, np.uint16)
    weights = np.zeros((rows, length), np.float16)
    for row in range(rows):
        n = length if rng.random() < FULL_LENGTH_SHARE else int(rng.integers(SHORTEST, length + 1))
        make = repetition if rng.random() < REPETITION_SHARE else questions
        ids[row, :n], weights[row, :n] = make(rng, n)
    return ids, weights


def repetition(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Filler in which one segment of an eighth to a half of the text comes twice: ids and weights, [length]."""
    text = filler(rng, length)
    weights = np.full(length, FILLER_WEIGHT, np.float16)
    span = int(rng.integers(length // 8, length // 2 + 1))
    first = int(rng.integers(0, length - 2 * span + 1))
    second = int(rng.integers(first + span, length - span + 1))
    text[second : second + span] = text[first : first + span]
    weights[second : second + span] = COPY_WEIGHT
    return text.astype(np.uint16), weights


def questions(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Filler with one to eight keys in it, then one to four questions with their answers: ids and weights, [length].

    Each question is about any of the keys, asked before or not: were each key asked once, a model would learn to name
    the ones still left, and never read the name.
    """
    room = max(length // _TOKENS_PER_KEY, 1)
    keys = named_keys(rng, int(rng.integers(1, min(MOST_KEYS, room) + 1)))
    tail: list[int] = []
    tail_weights: list[float] = []
    for at in rng.integers(0, len(keys), rng.integers(1, min(MOST_QUESTIONS, room) + 1)):
        question = keys[at].question()
        tail += [*question, *keys[at].digits.encode(), ord("."), END_OF_TEXT]
        tail_weights += [FILLER_WEIGHT] * len(question) + [FIRST_DIGIT_WEIGHT] + [DIGIT_WEIGHT] * (DIGITS - 1)
        tail_weights += [END_WEIGHT] * 2
    body = filler(
        rng, length - len(tail), every=np.exp(rng.uniform(*np.log([DENSEST_NUMBERS, TOKENS_PER_NUMBER])))
    )
    scatter(rng, body, keys)
    ids = np.concatenate([body, tail]).astype(np.uint16)
    return ids, np.concatenate([np.full(len(body), FILLER_WEIGHT), tail_weights]).astype(np.float16)
