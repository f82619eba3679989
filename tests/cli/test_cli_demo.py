"""`qwen-jax demo` shows the text's keys, the question and both answers, and draws the plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_jax.cli import demo as command
from qwen_jax.evals import demo
from qwen_jax.evals.passkey import Grid, make_task


def test_the_default_length_is_the_demos() -> None:
    assert command.DEFAULT_LENGTH == demo.DEFAULT_LENGTH


def test_within_the_training_length_both_find_the_key(run) -> None:
    out = run("demo", "--length", 900, "--depth", 0.5, "--seed", 3)
    task = make_task(np.random.default_rng(3), 900, 0.5)
    assert (out.code, out.stderr) == (0, "")
    assert f"  token {task.start:>7,}  {task.asked.name} {task.asked.digits}  <- asked for\n" in out.stdout
    for key in task.others:
        assert f"  {key.name} {key.digits}\n" in out.stdout
    assert f"Question: The pass key of {task.asked.name} is ...\n" in out.stdout
    answers = [line for line in out.stdout.splitlines() if line.endswith(" s")]
    assert [line.split("'")[0].strip() for line in answers] == [demo.DCA_TEMPERATURE, demo.PLAIN]
    assert all(f"'{task.asked.digits}" in line and " right " in line for line in answers)


def test_plot(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    asked: list[object] = []

    def grids(lengths, *, depths, trials, modes, report):
        asked.append((list(lengths), depths, trials))
        for mode in modes:
            for length in lengths:
                report(mode, length, depths * trials, depths)
        columns = tuple(np.linspace(0, 1, depths).tolist())
        return {
            mode: Grid(tuple(lengths), columns, trials, np.ones((len(lengths), depths), int))
            for mode in modes
        }

    monkeypatch.setattr(demo, "run", lambda *_, **__: None)
    monkeypatch.setattr(demo, "grids", grids)
    out = run("demo", "--length", 3000, "--plot", tmp_path / "p.png", "--depths", 4, "--trials", 2)
    assert out.code == 0
    assert asked == [([1024, 2048, 3000], 4, 2)]
    assert "plain RoPE           3,000 tokens   50% right\n" in out.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", 200_000], "up to 131072 tokens, got 200000"),
        (["--length", 10], "at least"),
        (["--depth", 1.5], "depth must lie between 0 and 1"),
        (["--seed", -1], "--seed"),
        (["--plot", "x.doc"], "--plot x.doc: the name must end in one of"),
        (["--plot", "/nowhere/x.png"], "--plot /nowhere/x.png: no such folder: /nowhere"),
    ],
)
def test_refused(refused, options: list[object], message: str) -> None:
    assert message in refused("demo", *options)
