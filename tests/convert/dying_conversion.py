"""Runs one conversion per requested death, each in a forked child, and prints how each ended. A program of test_converter.py.

Arguments: a JSON list of [src, dst, death]. A death is "progress:N" (killed on the N-th report), "before:NAME"
(killed on entering that step) or "fsize:N" (no file may grow past N bytes).
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import orbax.checkpoint.experimental.v1  # noqa: F401  imported once, before the forks
import tensorstore  # noqa: F401

from qwen_jax.convert import converter, orbax_folder
from qwen_jax.errors import CheckpointError

STEPS = {
    "finish": (orbax_folder.OrbaxWriter, "finish"),
    "companions": (converter, "_copy_companions"),
    "rename": (Path, "rename"),
}


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def convert(src: str, dst: str, death: str) -> None:
    kind, _, value = death.partition(":")
    progress = None
    if kind == "before":
        setattr(*STEPS[value], die)
    elif kind == "fsize":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
    else:
        seen: list[int] = []

        def progress(done: int, total: int) -> None:
            seen.append(done)
            if len(seen) == int(value):
                die()

    converter._LEAST_GROUP_BYTES = 30_000  # several groups, though the checkpoint is small
    try:
        converter.convert(src, dst, progress=progress, max_shard_bytes=20_000)
    except CheckpointError as error:
        print(f"refused: {error}", flush=True)
    else:
        print("converted", flush=True)


def main() -> None:
    for case in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            convert(*case)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            print(f"signal {os.WTERMSIG(status)}", flush=True)


if __name__ == "__main__":
    main()
