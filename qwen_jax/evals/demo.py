"""The logic of `qwen-jax demo`: a long text with a hidden key, what the model answers, and what plain RoPE answers."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from qwen_jax.config import DualChunk
from qwen_jax.errors import QwenJaxError
from qwen_jax.evals import demo_folder
from qwen_jax.evals.passkey import DIGITS, Grid, Task, evaluate, make_task
from qwen_jax.llm import LLM
from qwen_jax.sampling import SamplingParams

LONGEST = 131_072  # tokens
DEFAULT_LENGTH = 16_384  # 8 times the training length; both answers within 90 s on 2 CPU cores
# One chunk of s = 1,792 positions: every full piece of every length runs the same program.
PREFILL_CHUNK = demo_folder.DUAL_CHUNK.chunk_len
GREEDY = SamplingParams(max_new_tokens=DIGITS + 2, greedy=True)  # the key, a full stop, the end token

# The three ways of placing positions, by the names used in tables and plots.
DCA_TEMPERATURE, DCA, PLAIN = "DCA + temperature", "DCA", "plain RoPE"
MODES: dict[str, DualChunk | Literal[False]] = {
    DCA_TEMPERATURE: demo_folder.DUAL_CHUNK,
    DCA: dataclasses.replace(demo_folder.DUAL_CHUNK, original_max_position_embeddings=0),
    PLAIN: False,
}


@dataclasses.dataclass(frozen=True)
class Answered:
    """What one way of placing positions made of the text.

    Attributes:
        mode: a key of MODES.
        text: the generated answer.
        correct: it is the key asked for.
        seconds: prefill and answer together, compilation included.
    """

    mode: str
    text: str
    correct: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Demo:
    """One text, its question, and the answers in the order they were asked for."""

    task: Task
    answers: tuple[Answered, ...]

    @property
    def length(self) -> int:
        """Tokens of text and question."""
        return len(self.task.text)


def run(
    length: int = DEFAULT_LENGTH,
    *,
    depth: float = 0.3,
    seed: int = 0,
    modes: Sequence[str] = (DCA_TEMPERATURE, PLAIN),
    folder: str | Path = demo_folder.DEFAULT,
    progress: bool = False,
    on_task: Callable[[Task], None] | None = None,
    on_answer: Callable[[Answered], None] | None = None,
) -> Demo:
    """Hides keys in a text of `length` tokens, and asks for one of them in each of `modes`.

    Args:
        length: tokens of text and question; at most 131,072.
        depth: where the asked key stands, 0 (start) to 1 (right before the question).
        seed: of the text.
        modes: keys of MODES.
        folder: the checkpoint.
        progress: show a bar with the remaining time while prefilling, if stderr is a terminal.
        on_task: called with the text before it is answered.
        on_answer: called with each answer as it comes.

    Raises:
        QwenJaxError: a length or depth that makes no text, or a damaged checkpoint folder.
    """
    if length > LONGEST:
        raise QwenJaxError(f"the demo's texts go up to {LONGEST} tokens, got {length}")
    task = make_task(np.random.default_rng(seed), length, depth)
    if on_task:
        on_task(task)
    answers = []
    for mode in modes:
        began = time.monotonic()
        (text,) = answerer(mode, folder, length, progress=progress)([task])
        answers.append(Answered(mode, text, task.is_answer(text), time.monotonic() - began))
        if on_answer:
            on_answer(answers[-1])
    return Demo(task, tuple(answers))


def answerer(
    mode: str, folder: str | Path, longest: int, *, batch: int = 1, progress: bool = False
) -> Callable[[Sequence[Task]], list[str]]:
    """A function that has the checkpoint answer up to `batch` tasks of at most `longest` tokens at once, in one of MODES."""
    llm = LLM(
        folder,
        max_len=longest + DIGITS + 2,
        prefill_chunk=PREFILL_CHUNK,
        dca=_dual_chunk(mode),
        batch_size=batch,
        progress=progress,
    )

    def answer(tasks: Sequence[Task]) -> list[str]:
        return [generation.text for generation in llm.generate([task.ids for task in tasks], GREEDY)]

    return answer


def grids(
    lengths: Sequence[int],
    *,
    depths: int = 8,
    trials: int = 14,
    batch: int = 1,
    seed: int = 1,
    modes: Sequence[str] = tuple(MODES),
    folder: str | Path = demo_folder.DEFAULT,
    report: Callable[[str, int, int, int], None] | None = None,
) -> dict[str, Grid]:
    """Accuracy over length x depth for each of `modes`, on the same tasks.

    Args:
        lengths: tokens, question included.
        depths: columns, spread evenly from 0 to 1.
        trials: tasks a cell: depths * trials a length.
        batch: tasks that run together.
        seed: of the tasks.
        modes: keys of MODES.
        folder: the checkpoint.
        report: called after each batch with (mode, length, tasks done at this length, right answers among them).
    """
    columns = np.linspace(0, 1, depths).tolist()
    found = {}
    for mode in modes:
        answer = answerer(mode, folder, max(lengths), batch=batch)
        found[mode] = evaluate(
            answer, lengths, columns, trials, seed=seed, batch=batch,
            report=None if report is None else lambda *counts, mode=mode: report(mode, *counts),
        )  # fmt: skip
    return found


def doublings(longest: int, shortest: int = 1024) -> list[int]:
    """1,024, 2,048, ... up to `longest`, which comes last whether or not it is one of them."""
    steps = math.ceil(math.log2(max(longest, shortest) / shortest))
    return [*(shortest << step for step in range(steps)), longest]


def _dual_chunk(mode: str) -> DualChunk | Literal[False]:
    if mode not in MODES:
        raise QwenJaxError(f"no mode {mode!r}; there are {', '.join(map(repr, MODES))}")
    return MODES[mode]
