"""Several processes answer as one; one that dies takes the others along."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_jax import LLM
from tests import one_of_several_processes as program
from tests import tiny_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dual chunk attention, which would treble what every process compiles."""
    folder = tiny_checkpoint.write(
        tmp_path_factory.mktemp("processes") / "ckpt", dual_chunk_attention_config=None
    )
    return tiny_checkpoint.make_loud(folder)


def start(folder: Path, mesh: str, processes: int, *more: str) -> list[subprocess.Popen]:
    """Processes of four devices in all, each with its share."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
    }
    call = [sys.executable, program.__file__, str(folder), mesh, f"localhost:{port}", str(processes)]
    return [
        subprocess.Popen([*call, str(n), *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(processes)
    ]  # fmt: skip


def test_processes_give_the_tokens_and_scores_of_one(folder: Path) -> None:
    one = program.seen(LLM(folder, max_len=1024, prefill_chunk=1024))
    for mesh, count, *wishes in (("context=2,tensor=2", 2), ("data=2,context=2", 4, "tokens")):
        for process in start(folder, mesh, count, *wishes):
            out, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-2000:]
            seen = json.loads(out.splitlines()[-1])  # gloo has something to say, too
            assert seen["tokens"] == one["tokens"]
            if not wishes:
                np.testing.assert_allclose(seen["scores"], one["scores"], rtol=0, atol=2e-4)


def test_the_others_end_when_one_is_killed(folder: Path) -> None:
    first, second = start(folder, "tensor=2,context=2", 2, "tokens", "forever")
    with first, second:
        try:
            assert first.stdout is not None
            while "tokens" not in first.stdout.readline():  # until both are at work
                assert first.poll() is None
            second.kill()
            first.communicate(timeout=60)
            assert first.returncode != 0
        finally:
            first.kill()
            second.kill()
