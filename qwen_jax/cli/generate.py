"""`qwen-jax generate`: continue a text, answer a question, or many about one document."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_jax.cli import model, options
from qwen_jax.cli.document import RAW, Frame, chat_frame, frame_of
from qwen_jax.errors import QwenJaxError

if TYPE_CHECKING:
    import numpy as np

    from qwen_jax.context import Document
    from qwen_jax.llm import LLM, Prompt
    from qwen_jax.sampling import SamplingParams

EXAMPLES = """
[bold]Examples[/bold]

Continue a text:
[cyan]qwen-jax generate Qwen/Qwen2.5-0.5B --prompt "Once upon a time" --max-new-tokens 100[/cyan]

Ask through the chat template:
[cyan]qwen-jax generate ckpt/ --chat --prompt "Why is the sky blue?"[/cyan]

Several questions about a book that is read once:
[cyan]qwen-jax generate ckpt/ --prompt-file book.txt --question "Who dies?" --question "Who did it?"[/cyan]

Read it now, ask later:
[cyan]qwen-jax generate ckpt/ --prompt-file book.txt --save-prefix book.kv/[/cyan]
[cyan]qwen-jax generate ckpt/ --prefix book.kv/ --question "Who dies?"[/cyan]

Token ids in, token ids out, without a tokenizer:
[cyan]qwen-jax generate ckpt/ --token-ids 9707,11,1879 --max-new-tokens 8 --greedy[/cyan]

On two machines of four GPUs each, under Slurm (docs/pods.md has the others):
[cyan]srun -n 8 qwen-jax generate ckpt/ --prompt-file book.txt --mesh context=2,tensor=4 --distributed[/cyan]
"""

_PROMPT = "Prompt"


def command(
    path: model.Path,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt, or the document.", rich_help_panel=_PROMPT)
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="The same from a file; - is standard input.", rich_help_panel=_PROMPT
        ),
    ] = None,
    token_ids: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,3", help="The same as token ids; prints the new ids.", rich_help_panel=_PROMPT
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A document saved by --save-prefix.", rich_help_panel=_PROMPT),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A question about the document, which is prefilled once; may be repeated.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the chat template.", rich_help_panel=_PROMPT)
    ] = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="No chat template around document and question either.", rich_help_panel=_PROMPT
        ),
    ] = False,
    save_prefix: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Save the prefilled document to this new folder.", rich_help_panel=_PROMPT
        ),
    ] = None,
    anew: Annotated[
        bool,
        typer.Option(
            "--anew",
            help="Prefill the saved document again with each question: exact, and slow.",
            rich_help_panel=_PROMPT,
        ),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option("--stream/--no-stream", help="Show the answer as it grows.", rich_help_panel=_PROMPT),
    ] = True,
    max_new_tokens: model.MaxNewTokens = None,
    greedy: model.Greedy = None,
    temperature: model.Temperature = None,
    top_k: model.TopK = None,
    top_p: model.TopP = None,
    repetition_penalty: model.RepetitionPenalty = None,
    seed: model.Seed = 0,
    stop: model.Stop = None,
    ignore_eos: model.IgnoreEos = False,
    max_len: model.MaxLen = None,
    prefill_chunk: model.PrefillChunk = None,
    dtype: model.Dtype = None,
    kv_dtype: model.KvDtype = None,
    weight_dtype: model.WeightDtype = None,
    matmul: model.Matmul = None,
    sparsity: model.Sparsity = None,
    dca: model.Dca = None,
    mesh: model.Mesh = None,
    distributed: model.Distributed = False,
    coordinator: model.Coordinator = None,
    num_processes: model.NumProcesses = None,
    process_id: model.ProcessId = None,
) -> None:
    """Continue a text, or answer questions about a document.

    The answer goes to standard output, everything else to standard error. A prompt is continued as it stands;
    [bold]--chat[/bold] makes it a user message. With [bold]--question[/bold], document and question become one user
    message if the checkpoint has a chat template; with [bold]--raw[/bold], or without a template, the question follows
    the document directly.
    """
    _check(prompt, prompt_file, token_ids, prefix, question, chat, raw, save_prefix, anew)
    text: Prompt | None = options.token_ids(token_ids) if token_ids is not None else prompt
    if prompt_file is not None:
        text = options.text_of(prompt_file, "--prompt-file")
    params = model.sampling(
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    model.join(distributed, coordinator, num_processes, process_id, mesh)
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
    if not (question or prefix or save_prefix):
        if chat:
            assert isinstance(text, str)
            text = llm.render([{"role": "user", "content": text}])
        assert text is not None
        return _answer(llm, text, params, as_ids=token_ids is not None, stream=stream)

    questions = question or []
    frame = (
        chat_frame(llm.tokenizer) if llm.tokenizer and llm.tokenizer.has_chat_template and not raw else RAW
    )
    if prefix is not None:
        document = llm.load_prefix(prefix)
        if llm.tokenizer:
            frame = frame_of(document, llm.tokenizer, frame)
        model.note(f"{prefix}: {len(document):,} tokens")
    else:
        assert text is not None
        ids = llm.token_ids(frame.document(text) if isinstance(text, str) else text)
        _check_room(llm, len(ids), [frame.question(each) for each in questions], params)
        document = _prefill(llm, ids)
    if save_prefix is not None:
        document.save(save_prefix)
        model.note(f"{save_prefix}: saved")
    if prefix is not None and text is not None:  # a continuation of the saved document
        _answer(llm, text, params, document, anew=anew, as_ids=token_ids is not None, stream=stream)
    _answer_all(llm, questions, params, document, frame, anew, stream)
    return None


def _check(
    prompt: str | None,
    prompt_file: str | None,
    token_ids: str | None,
    prefix: str | None,
    questions: list[str] | None,
    chat: bool,
    raw: bool,
    save_prefix: str | None,
    anew: bool,
) -> None:
    """Refuses what does not go together, before anything is loaded."""
    given = [
        name
        for name, value in (("--prompt", prompt), ("--prompt-file", prompt_file), ("--token-ids", token_ids))
        if value is not None
    ]
    if len(given) > 1:
        raise QwenJaxError(f"{' and '.join(given)}: give one of them")
    if not given and prefix is None:
        raise QwenJaxError("nothing to answer: give --prompt, --prompt-file, --token-ids or --prefix")
    if prefix is not None and not given and not questions:
        raise QwenJaxError("--prefix needs a --question, or a --prompt to follow it")
    if prefix is not None and given and questions:
        raise QwenJaxError(f"{given[0]} and --question both follow --prefix: give one of them")
    if prefix is not None and save_prefix is not None:
        raise QwenJaxError("--prefix is saved already: leave out --save-prefix")
    if anew and prefix is None:
        raise QwenJaxError("--anew goes with --prefix: without it everything is prefilled anyway")
    if any(not question.strip() for question in questions or []):
        raise QwenJaxError("--question: the question is empty")
    if token_ids is not None and (chat or questions):
        raise QwenJaxError("--token-ids goes with neither --chat nor --question: those are text")
    if chat and (raw or questions or prefix or save_prefix):
        raise QwenJaxError("--chat is for a prompt alone; --question uses the chat template by itself")
    if save_prefix is not None and Path(save_prefix).exists():
        raise QwenJaxError(f"--save-prefix {save_prefix}: exists already: choose another folder or remove it")


def _check_room(llm: LLM, document: int, questions: list[str], params: SamplingParams) -> None:
    """Refuses a question that would not fit behind the document before the document is prefilled, which may take long."""
    longest = max((len(llm.token_ids(question)) for question in questions), default=0)
    new = (params.max_new_tokens or 1) if questions else 0
    if document + longest + new > llm.max_len:
        raise QwenJaxError(
            f"a document of {document} tokens, a question of {longest} and {new} new tokens do not fit "
            f"max_len={llm.max_len}: raise --max-len, or shorten the document"
        )


def _prefill(llm: LLM, ids: np.ndarray) -> Document:
    import jax

    start = time.perf_counter()
    document = llm.prefill(ids)
    jax.block_until_ready(document.cache)
    seconds = time.perf_counter() - start
    speed = len(document) / seconds
    model.note(f"document: {len(document):,} tokens in {seconds:.2f} s ({speed:,.0f} a second)")
    return document


def _answer_all(
    llm: LLM,
    questions: list[str],
    params: SamplingParams,
    document: Document,
    frame: Frame,
    anew: bool,
    stream: bool,
) -> None:
    for number, text in enumerate(questions):
        if len(questions) > 1:
            model.note(("\n" if number else "") + f"> {text}")
        _answer(llm, frame.question(text), params, document, anew=anew, stream=stream)


def _answer(
    llm: LLM,
    prompt: Prompt,
    params: SamplingParams,
    prefix: Document | None = None,
    *,
    anew: bool = False,
    as_ids: bool = False,
    stream: bool = True,
) -> None:
    """Prints one answer to stdout, and to stderr how long it took."""
    start = time.perf_counter()
    pieces = llm.stream(prompt, params, prefix=prefix, anew=anew)
    first: float | None = None
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            answer = end.value
            break
        if first is None:
            first = time.perf_counter() - start
        if stream and not as_ids:
            typer.echo(piece, nl=False)
    if as_ids:
        typer.echo(" ".join(map(str, answer.token_ids)))
    else:
        typer.echo("" if stream else answer.text)
    seconds, count = time.perf_counter() - start, len(answer.token_ids)
    begun = "" if first is None else f", the first text after {first:.2f} s"
    model.note(
        f"{answer.prompt_tokens:,} tokens of prompt, {count:,} new in {seconds:.2f} s ({count / seconds:.1f} a second)"
        f"{begun}; ended by {answer.finish_reason}"
    )
