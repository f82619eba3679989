"""Which programs JAX compiles on the way to something."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import jax
import pytest


def programs_of(run: Callable[[], object], caplog: pytest.LogCaptureFixture) -> list[str]:
    """The names of the jitted functions that `run` compiles, in order, if nothing was compiled before."""
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run()
    return re.findall(r"Finished XLA compilation of jit\((\S+)\)", caplog.text)
