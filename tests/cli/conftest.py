"""The command in this process, on random checkpoints of a few kilobytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_checkpoint
from typer.testing import CliRunner

from qwen_jax.cli import app
from qwen_jax.cli.compilation_cache import VARIABLE
from qwen_jax.llm import LLM


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run of the command left."""

    code: int
    stdout: str
    stderr: str


Run = Callable[..., Outcome]
Refused = Callable[..., str]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def llm(checkpoint: Path) -> LLM:
    """The same checkpoint through the Python API."""
    return LLM(checkpoint)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("info", path): runs `qwen-jax info PATH`."""
    monkeypatch.setenv(VARIABLE, "off")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    def apply(*args: object, stdin: str | bytes | None = None) -> Outcome:
        result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, prog_name="qwen-jax")
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return apply


@pytest.fixture
def refused(run: Run) -> Refused:
    """refused("info", path): the message of a run that must end with one line and exit code 2."""

    def apply(*args: object, stdin: str | bytes | None = None) -> str:
        outcome = run(*args, stdin=stdin)
        assert outcome.code == 2, outcome
        assert outcome.stdout == ""
        assert outcome.stderr.startswith("qwen-jax: error: ")
        assert outcome.stderr.count("\n") == 1
        assert outcome.stderr.endswith("\n")
        return outcome.stderr.removeprefix("qwen-jax: error: ").rstrip("\n")

    return apply
