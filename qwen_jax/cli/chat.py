"""`qwen-jax chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_jax.cli import model
from qwen_jax.cli.errors import show
from qwen_jax.errors import QwenJaxError

if TYPE_CHECKING:
    from qwen_jax.chat import Chat
    from qwen_jax.sampling import SamplingParams

EXAMPLES = """
[bold]Examples[/bold]

[cyan]qwen-jax chat Qwen/Qwen2.5-0.5B-Instruct[/cyan]

[cyan]qwen-jax chat ckpt/ --system "Answer in French." --temperature 0.7[/cyan]

In the conversation: /reset starts it anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer.
"""

_LEAVE, _RESET = ("/exit", "/quit"), "/reset"


def command(
    path: model.Path,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: model.MaxNewTokens = None,
    greedy: model.Greedy = None,
    temperature: model.Temperature = None,
    top_k: model.TopK = None,
    top_p: model.TopP = None,
    repetition_penalty: model.RepetitionPenalty = None,
    seed: model.Seed = 0,
    stop: model.Stop = None,
    max_len: model.MaxLen = None,
    prefill_chunk: model.PrefillChunk = None,
    dtype: model.Dtype = None,
    kv_dtype: model.KvDtype = None,
    weight_dtype: model.WeightDtype = None,
    matmul: model.Matmul = None,
    sparsity: model.Sparsity = None,
    dca: model.Dca = None,
    mesh: model.Mesh = None,
) -> None:
    """Talk with a model.

    Each turn continues from the cache of the turns before it. Ctrl-C stops an answer and takes the turn back. From a
    pipe, every line is a turn.
    """
    params = model.sampling(
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        ignore_eos=False,
    )
    llm = model.load(
        path,
        max_len=max_len,
        prefill_chunk=prefill_chunk,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weight_dtype=weight_dtype,
        matmul=matmul,
        sparsity=sparsity,
        dca=dca,
        mesh=mesh,
    )
    from qwen_jax.chat import Chat

    chat = Chat(llm, system)
    for text in _turns():
        if text == _RESET:
            chat = Chat(llm, system)
            continue
        try:
            finished = _answer(chat, text, params)
        except QwenJaxError as error:
            if not sys.stdin.isatty():
                raise
            show(str(error))
            continue
        if (
            not finished
        ):  # the cache may have been lost in mid-step: the next turn prefills the conversation again
            messages, chat = chat.messages, Chat(llm, system)
            chat.messages = messages


def _turns() -> Iterator[str]:
    """What the user types, until they leave."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history and line editing)
        typer.echo("/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer", err=True)
    while True:
        try:
            text = input("> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            typer.echo("\n(/exit or Ctrl-D leaves)", err=True)
            continue
        if text in _LEAVE:
            return
        if text:
            yield text


def _answer(chat: Chat, text: str, params: SamplingParams) -> bool:
    """Shows one answer; False if it was broken off between two steps of the device, so that its cache may be lost."""
    stop, lost = _Stop(), False
    try:
        with stop:
            for piece in chat.stream(text, params):
                typer.echo(piece, nl=False)
                if stop.asked:
                    break
    except KeyboardInterrupt:
        lost = True
    typer.echo()
    if stop.asked:
        typer.echo("(stopped: this turn is forgotten)", err=True)
    return not lost


class _Stop:
    """While entered, the first Ctrl-C only sets `asked`, for the answer to stop where it is safe; the second interrupts."""

    asked = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._on_signal)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        typer.echo(" stopping; Ctrl-C again to stop at once", err=True)
