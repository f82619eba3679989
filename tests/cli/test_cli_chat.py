"""`qwen-jax chat`: turns, commands, and what Ctrl-C does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_jax.chat import Chat
from qwen_jax.cli import chat as command
from qwen_jax.llm import LLM
from qwen_jax.sampling import SamplingParams

EIGHT = SamplingParams(max_new_tokens=8)


def test_turns_from_a_pipe(run, checkpoint: Path, llm: LLM) -> None:
    chat = Chat(llm, "Be brief.")
    expected = [chat.send(text, EIGHT).text for text in ("Hello", "Again")]
    fresh = Chat(llm, "Be brief.").send("Anew", EIGHT).text
    out = run(
        "chat",
        checkpoint,
        "--system",
        "Be brief.",
        "--max-new-tokens",
        8,
        stdin="Hello\n\nAgain\n/reset\nAnew\n/exit\nLost\n",
    )
    assert (out.code, out.stdout) == (0, "\n".join([*expected, fresh, ""]))
    assert out.stderr == ""


def test_end_of_input_leaves(run, checkpoint: Path) -> None:
    out = run("chat", checkpoint, stdin="")
    assert (out.code, out.stdout) == (0, "")


def test_a_turn_too_long_ends_a_pipe_with_one_line(run, checkpoint: Path) -> None:
    out = run("chat", checkpoint, "--max-len", 60, "--max-new-tokens", 8, stdin="x" * 50)
    assert out.code == 2
    assert out.stderr.startswith("qwen-jax: error: ")
    assert "max_len=60" in out.stderr


class Interrupted(Chat):
    """Ctrl-C arrives as often as `times` says, after the first piece of the first answer."""

    times = 1

    def stream(self, text: str, params: SamplingParams | None = None) -> Iterator[str]:
        for piece in super().stream(text, params):
            times, type(self).times = self.times, 0
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            yield piece


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_takes_the_turn_back(run, checkpoint: Path, llm: LLM, monkeypatch, times: int) -> None:
    monkeypatch.setattr("qwen_jax.chat.Chat", Interrupted)
    monkeypatch.setattr(Interrupted, "times", times)
    before = signal.getsignal(signal.SIGINT)
    out = run("chat", checkpoint, "--max-new-tokens", 40, stdin="Stopped\nHello\n")
    assert out.code == 0
    assert out.stdout.endswith("\n" + Chat(llm).send("Hello", SamplingParams(max_new_tokens=40)).text + "\n")
    assert out.stderr.count("(stopped: this turn is forgotten)") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_does_not_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["one", KeyboardInterrupt(), "", " two ", EOFError()])

    def fake_input(_: str) -> str:
        item = next(typed)
        if isinstance(item, BaseException):
            raise item
        return item

    monkeypatch.setattr("builtins.input", fake_input)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert list(command._turns()) == ["one", "two"]
    assert "(/exit or Ctrl-D leaves)" in capsys.readouterr().err
