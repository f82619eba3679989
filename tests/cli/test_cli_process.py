"""The command as a process of its own: it starts at once, and keeps compiled programs between runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax.cli.compilation_cache import VARIABLE, use_compilation_cache

JAX_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def run(*args: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in (VARIABLE, JAX_VARIABLE)}
    return subprocess.run(
        [sys.executable, "-m", "qwen_jax", *map(str, args)],
        env=environment | {"JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("command", [[], ["demo"], ["generate"], ["chat"], ["convert"], ["plan"], ["info"]])
def test_help_has_examples(command: list[str]) -> None:
    from typer.testing import CliRunner

    from qwen_jax.cli import app

    shown = CliRunner().invoke(app, [*command, "--help"]).output
    assert "Usage: " in shown
    if command:
        assert "Examples" in shown
        assert f"qwen-jax {command[0]} " in shown


def test_help_comes_without_jax() -> None:
    code = (
        "import sys; from qwen_jax.cli import app\n"
        "for args in (['--help'], ['generate', '--help'], ['generate', 'x']):\n"
        "    try: app(args)\n"
        "    except SystemExit: pass\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_programs_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = run("generate", checkpoint, "--token-ids", "1,2,3", "--max-new-tokens", 4, XDG_CACHE_HOME=str(cache),
               JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
    assert done.stderr.count("\n") == 1  # the timing, and no warnings
    assert [path for path in cache.glob("qwen-jax/compiled/*/*") if "prefill" in path.name]


def test_errors_of_a_process() -> None:
    done = run("info", "/nowhere/at/all", XDG_CACHE_HOME="/dev/null")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "qwen-jax: error: /nowhere/at/all: no such folder\n"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in (JAX_VARIABLE, LEAST_SECONDS):
        monkeypatch.setenv(name, "")  # so that what the test leaves is taken back
        del os.environ[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return monkeypatch


def test_cache_folder(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_compilation_cache()
    folder = Path(os.environ[JAX_VARIABLE])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "qwen-jax" / "compiled"
    use_compilation_cache(str(tmp_path / "mine"))
    assert os.environ[JAX_VARIABLE] == str(tmp_path / "mine")
    use_compilation_cache("off")
    assert JAX_VARIABLE not in os.environ


def test_jax_own_variable_wins(environment: pytest.MonkeyPatch) -> None:
    environment.setenv(JAX_VARIABLE, "/somewhere")
    use_compilation_cache()
    assert os.environ[JAX_VARIABLE] == "/somewhere"


def test_a_cache_that_cannot_be_written_is_left_out(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    use_compilation_cache(str(tmp_path / "file" / "folder"))
    assert JAX_VARIABLE not in os.environ
