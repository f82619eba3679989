"""The options that say which model is loaded and how; `generate` and `chat` share them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_jax.cli import options

if TYPE_CHECKING:
    from qwen_jax.llm import LLM
    from qwen_jax.sampling import SamplingParams

_MODEL, _SAMPLING = "Model", "Sampling (what is left out comes from generation_config.json)"
_PROCESSES = "Several processes (start the same command on every machine)"

Path = Annotated[
    str, typer.Argument(metavar="PATH", help="A Hugging Face folder, a converted folder or a hub id.")
]
MaxLen = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of prompt and answer together.", rich_help_panel=_MODEL, show_default="the model's"
    ),
]
PrefillChunk = Annotated[int | None, typer.Option(help="Tokens of a prefill piece.", rich_help_panel=_MODEL)]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="bfloat16, float16 or float32.", rich_help_panel=_MODEL, show_default="the checkpoint's"
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        help="Of the cache: --dtype's, int8 or fp8.",
        rich_help_panel=_MODEL,
        show_default="that of the weights",
    ),
]
WeightDtype = Annotated[
    str | None,
    typer.Option(
        metavar="int8|fp8",
        help="The layers' matrices in 8 bits.",
        rich_help_panel=_MODEL,
        show_default="that of the activations",
    ),
]
Matmul = Annotated[
    str | None,
    typer.Option(
        metavar="fp8",
        help="Prefill multiplies fp8 weights with activations rounded to fp8: faster on Hopper, less exact.",
        rich_help_panel=_MODEL,
        show_default="in the dtype of the activations",
    ),
]
Sparsity = Annotated[
    str | None,
    typer.Option(
        metavar="vertical-slash|bands[:SHARE]|none",
        help="Sparse prefill of long prompts.",
        rich_help_panel=_MODEL,
        show_default="on if the checkpoint has head budgets",
    ),
]
Dca = Annotated[
    str | None,
    typer.Option(
        metavar="c,w[,L0]|none",
        help="Dual chunk attention to use instead of the config's: chunk size, local size and, for the length "
        "temperature, original positions.",
        rich_help_panel=_MODEL,
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS=N,...",
        help="Spread the model over devices: context=2,tensor=4.",
        rich_help_panel=_MODEL,
        show_default="one device",
    ),
]

Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="This is one of several processes; --mesh is over the devices of all. Slurm, Open MPI, Kubernetes and Cloud "
        "TPUs say which; elsewhere give the three options below.",
        rich_help_panel=_PROCESSES,
    ),
]
Coordinator = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Where process 0 listens.", rich_help_panel=_PROCESSES),
]
NumProcesses = Annotated[int | None, typer.Option(help="How many there are.", rich_help_panel=_PROCESSES)]
ProcessId = Annotated[int | None, typer.Option(help="Which this is; 0 prints.", rich_help_panel=_PROCESSES)]

MaxNewTokens = Annotated[int | None, typer.Option(help="Most tokens to answer.", rich_help_panel=_SAMPLING)]
Greedy = Annotated[
    bool | None,
    typer.Option("--greedy", help="Always the likeliest token.", rich_help_panel=_SAMPLING),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopK = Annotated[int | None, typer.Option(help="0 is all.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float | None, typer.Option(help="In (0, 1].", rich_help_panel=_SAMPLING)]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: less repetition.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answer.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="Text that ends the answer; may be repeated.", rich_help_panel=_SAMPLING
    ),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on past the end token.", rich_help_panel=_SAMPLING)
]


def join(
    distributed: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    mesh: str | None,
) -> None:
    """Joins the other processes where --distributed asks for it; all but the first then keep their answers to themselves."""
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if not distributed:
        if wrong := [name for name, value in given.items() if value is not None]:
            raise options.OptionError(f"{wrong[0]} goes with --distributed")
        return
    if mesh is None:
        raise options.OptionError(
            "--distributed needs --mesh: how the devices of all processes share the work"
        )

    from qwen_jax.processes import is_first, join

    join(coordinator, num_processes, process_id)
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)


def note(text: str) -> None:
    """A line about the run, on stderr; of several processes the first prints it."""
    from qwen_jax.processes import is_first

    if is_first():
        typer.echo(text, err=True)


def load(
    path: str,
    *,
    max_len: int | None,
    prefill_chunk: int | None,
    dtype: str | None,
    kv_dtype: str | None,
    weight_dtype: str | None,
    matmul: str | None,
    sparsity: str | None,
    dca: str | None,
    mesh: str | None,
) -> LLM:
    """The model as the options ask for it, with progress bars on a terminal."""
    dual_chunk = options.dual_chunk(dca)
    options.check_dtype(dtype)

    from qwen_jax.llm import LLM
    from qwen_jax.processes import is_first

    return LLM(
        path,
        max_len=max_len,
        prefill_chunk=prefill_chunk,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weight_dtype=weight_dtype,
        matmul=matmul,
        sparsity=sparsity,
        dca=dual_chunk,
        mesh=options.mesh(mesh),
        progress=is_first(),
    )


def sampling(
    *,
    max_new_tokens: int | None,
    greedy: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    seed: int,
    stop: list[str] | None,
    ignore_eos: bool,
) -> SamplingParams:
    """The settings as given, checked before a model is loaded."""
    from qwen_jax.sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        greedy=greedy,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    params.resolve()
    return params
