"""`qwen-jax plan`: will it fit, and how long will it take at best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_jax.cli import model

EXAMPLES = """
[bold]Examples[/bold]

[cyan]qwen-jax plan ckpt/ --context 1010000 --devices h200:1[/cyan]

[cyan]qwen-jax plan Qwen/Qwen2.5-14B-Instruct-1M --context 1010000 --devices v5p:2x2x1 --kv-dtype int8[/cyan]

[cyan]qwen-jax plan ckpt/ --context 131072 --devices h100:8 --mesh context=2,tensor=4[/cyan]
"""


def command(
    path: model.Path,
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")],
    devices: Annotated[
        str, typer.Option(metavar="KIND:COUNT", help="h200:1, or a TPU slice by its topology: v5p:2x2x1.")
    ],
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the cache: bfloat16, int8, fp8 ...")] = None,
    weight_dtype: Annotated[str | None, typer.Option(help="Of the weights: bfloat16, int8, fp8 ...")] = None,
    matmul: model.Matmul = None,
    density: Annotated[float, typer.Option(help="Share of the attention that prefill computes.")] = 1.0,
    prefill_chunk: Annotated[int | None, typer.Option(help="Tokens of a prefill piece.")] = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="AXIS=N,...", help="Sizes of data, context and tensor.")
    ] = None,
    dca: model.Dca = None,
) -> None:
    """Show the bytes per device and the least seconds, before anything is loaded.

    Needs only the config: of a folder, or of a repository on the hub. Exit code 2 if it does not fit.
    """
    from rich.console import Console

    from qwen_jax.build import with_dca
    from qwen_jax.cli import options
    from qwen_jax.config import ModelConfig
    from qwen_jax.hub import resolve
    from qwen_jax.plan import plan, render

    folder = resolve(path, ("config.json",)) if not Path(path).expanduser().exists() else resolve(path)
    made = plan(
        with_dca(ModelConfig.from_folder(folder), options.dual_chunk(dca)),
        context,
        devices,
        batch=batch,
        kv_dtype=kv_dtype,
        weight_dtype=weight_dtype,
        matmul=matmul,
        prefill_chunk=prefill_chunk,
        density=density,
        mesh=mesh,
    )
    Console(soft_wrap=True).print(render(made))
    made.check()
