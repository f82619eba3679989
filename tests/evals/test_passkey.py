"""Pass key texts: exact length and depth, one needle asked for, and a fair count of right answers."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import QwenJaxError
from qwen_jax.evals import passkey
from qwen_jax.evals.passkey import Task, evaluate, filler, grid_tasks, make_task

NEEDLE = re.compile(r" The pass key of (\w+) is (\d+)\. ")
QUESTION = re.compile(r"\nThe pass key of (\w+) is $")


@given(
    seed=st.integers(0, 2**32), length=st.integers(400, 5000), depth=st.floats(0, 1), keys=st.integers(1, 4)
)
def test_a_text_holds_its_keys_once_and_asks_for_one(seed: int, length: int, depth: float, keys: int) -> None:
    task = make_task(np.random.default_rng(seed), length, depth, keys)
    assert len(task.text) == len(task.ids) == length
    assert task.ids.dtype == np.int32
    assert task.ids.max() < 128
    found = {match[1]: match[2] for match in NEEDLE.finditer(task.text)}
    assert len(NEEDLE.findall(task.text)) == len(found) == keys
    assert QUESTION.search(task.text)[1] == task.asked.name
    assert found == {key.name: key.digits for key in (task.asked, *task.others)}
    assert len(set(found.values())) == keys
    assert len({name[0] for name in found}) == keys
    assert task.text.count(task.asked.digits) == 1
    assert task.text.startswith(task.asked.needle().decode(), task.start)


@given(seed=st.integers(0, 2**32), length=st.integers(400, 5000))
def test_depth_runs_from_the_first_token_to_the_question(seed: int, length: int) -> None:
    first, middle, last = (make_task(np.random.default_rng(seed), length, depth) for depth in (0, 0.5, 1))
    room = length - len(first.asked.question()) - len(first.asked.needle())
    assert (first.start, last.start) == (0, room)
    assert abs(middle.start - room / 2) <= 0.5


@given(seed=st.integers(0, 2**32), length=st.integers(0, 3000))
def test_filler_is_words_and_whole_numbers(seed: int, length: int) -> None:
    text = filler(np.random.default_rng(seed), length).tobytes().decode()
    assert len(text) == length
    assert re.fullmatch(r"[a-z0-9 ]*", text)
    assert all(len(number) == 5 for number in re.findall(r"\d+", text))


def test_numbers_are_strewn_about() -> None:
    text = filler(np.random.default_rng(0), 100_000).tobytes().decode()
    assert 900 < len(re.findall(r" \d{5} ", text)) < 1100


def test_a_seed_gives_one_task_and_another_seed_another() -> None:
    one, same, other = (grid_tasks(600, (0.3,), 2, seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert one[0] != one[1]


@pytest.mark.parametrize(
    ("length", "depth", "keys", "says"),
    [(200, 0.5, 4, "at least 326 tokens, got 200"), (600, 1.5, 4, "between 0 and 1"), (600, 0.5, 0, "got 0"),
     (9000, 0.5, 15, "1 to 14 keys, got 15")],
)  # fmt: skip
def test_impossible_tasks_are_refused(length: int, depth: float, keys: int, says: str) -> None:
    with pytest.raises(QwenJaxError, match=says):
        make_task(np.random.default_rng(0), length, depth, keys)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("48213", True), ("48213.", True), (" 48213.\n", True), ("482134", False), ("4821", False), ("x48213", False)],
)  # fmt: skip
def test_an_answer_is_the_whole_key(answer: str, right: bool) -> None:
    assert Task("", passkey.Key("Ravoti", "48213"), (), 0).is_answer(answer) is right


def test_the_grid_counts_by_length_and_depth() -> None:
    sizes = []

    def reads_the_second_half(tasks: list[Task]) -> list[str]:
        sizes.append(len(tasks))
        return [task.asked.digits if task.start > len(task.text) / 2 else "no idea" for task in tasks]

    grid = evaluate(reads_the_second_half, (500, 1000), (0.0, 0.9), 3, batch=4)
    assert sizes == [4, 2, 4, 2]
    np.testing.assert_array_equal(grid.correct, [[0, 3], [0, 3]])
    assert grid.by_length() == {500: 0.5, 1000: 0.5}
