"""How an error leaves the command: one line on stderr and an exit code, a traceback only for bugs or with --debug."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from qwen_jax.errors import QwenJaxError

USER_ERROR, DEVICE_ERROR, INTERRUPTED = 2, 1, 130
_DEVICE_TEXT = 300  # characters of XLA's own words; they can be pages


class ErrorsAsOneLine(TyperGroup):
    """The group of all commands.

    Exit codes: 2 for what the user can put right, 1 for what the machine refuses (out of memory), 130 for Ctrl-C.

    Attributes:
        debug: let errors through, traceback and all.
    """

    debug = False

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if self.debug:
                raise
            _leave(error)
        sys.exit(code if isinstance(code, int) else 0)


def _leave(error: Exception) -> NoReturn:
    """Prints the error and exits; raises it again if it is a bug of ours."""
    if hasattr(error, "format_message"):  # a usage error of typer's
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "qwen-jax"
        fail(f"{error.format_message()} (see {where} --help)", USER_ERROR)
    if isinstance(error, QwenJaxError):
        fail(str(error), USER_ERROR)
    if isinstance(error, OSError):
        fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part), USER_ERROR)
    if isinstance(error, MemoryError):
        fail("out of memory", DEVICE_ERROR)
    if any(kind.__name__ == "JaxRuntimeError" for kind in type(error).__mro__):
        fail(_device_message(str(error)), DEVICE_ERROR)
    raise error


def _device_message(text: str) -> str:
    if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        reason = (
            "the device is out of memory: lower --max-len or --prefill-chunk, or spread the model with --mesh"
        )
    else:
        reason = "the device failed"
    return f"{reason} ({text[:_DEVICE_TEXT]})"


def fail(message: str, code: int) -> NoReturn:
    """Prints the error and exits."""
    show(message)
    sys.exit(code)


def show(message: str) -> None:
    """Prints an error as one line."""
    typer.echo(f"qwen-jax: error: {' '.join(message.split())}", err=True)
