"""The `qwen-jax` command: one file a subcommand, each a thin layer over the Python API.

Nothing here imports jax before a command runs, so that `--help` and usage errors come at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qwen_jax import __version__
from qwen_jax.cli import chat, convert, demo, generate, info, plan, refine, search
from qwen_jax.cli.compilation_cache import VARIABLE as CACHE_VARIABLE
from qwen_jax.cli.compilation_cache import use_compilation_cache
from qwen_jax.cli.errors import ErrorsAsOneLine


def _flowing(text: str | None) -> str:
    """Paragraphs without the line breaks of the source: rich keeps those."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


app = typer.Typer(
    name="qwen-jax",
    cls=ErrorsAsOneLine,
    help="Qwen2.5 with contexts of one million tokens, in JAX.",
    rich_markup_mode="rich",
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (demo, generate, chat, convert, search, refine, plan, info):
    name = module.__name__.rpartition(".")[2]
    app.command(name, help=_flowing(module.command.__doc__), epilog=module.EXAMPLES)(module.command)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    compilation_cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|off",
            envvar=CACHE_VARIABLE,
            help="Where compiled programs are kept between runs.",
            show_default="~/.cache/qwen-jax",
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    assert isinstance(context.command, ErrorsAsOneLine)
    context.command.debug = debug
    if version:
        typer.echo(f"qwen-jax {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit
    use_compilation_cache(compilation_cache)


def main() -> None:
    """Runs the command line of this process; never returns."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a terminal that cannot show a character is no reason to stop
    app(prog_name="qwen-jax")
