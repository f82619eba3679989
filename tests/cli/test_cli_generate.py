"""`qwen-jax generate` gives what the Python API gives, on stdout and nothing else there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint

from qwen_jax.llm import LLM
from qwen_jax.sampling import SamplingParams

EIGHT = SamplingParams(max_new_tokens=8, ignore_eos=True)
N = ("--max-new-tokens", 8, "--ignore-eos")
DOCUMENT = "The river is called Alva.\n" * 2
QUESTION = "What is the river called?"


def test_continues_a_prompt(run, checkpoint: Path, llm: LLM) -> None:
    expected = llm.generate("Once upon", EIGHT)
    for stream in ("--stream", "--no-stream"):
        out = run("generate", checkpoint, "--prompt", "Once upon", *N, stream)
        assert (out.code, out.stdout) == (0, expected.text + "\n")
        assert "9 tokens of prompt, 8 new" in out.stderr


def test_streaming_prints_before_the_answer_is_whole(run, checkpoint: Path, monkeypatch) -> None:
    import typer

    pieces: list[str] = []
    real = typer.echo

    def echo(message: str = "", **options: object) -> None:
        if not options.get("err"):
            pieces.append(message)
        real(message, **options)

    monkeypatch.setattr(typer, "echo", echo)
    out = run("generate", checkpoint, "--prompt", "Once upon", "--max-new-tokens", 40, "--ignore-eos")
    assert out.code == 0
    assert len(pieces) > 3


def test_token_ids_need_no_tokenizer(run, llm: LLM, tmp_path: Path) -> None:
    folder = tiny_checkpoint.write(tmp_path / "bare", tokenizer=False)
    expected = llm.generate([1, 2, 3], EIGHT).token_ids
    for text in ("1,2,3", "1 2 3", "1, 2, 3,"):
        out = run("generate", folder, "--token-ids", text, *N, "--greedy")
        assert (out.code, out.stdout) == (0, " ".join(map(str, expected)) + "\n")


def test_prompt_from_a_file_and_from_stdin_is_taken_as_it_is(
    run, checkpoint: Path, llm: LLM, tmp_path: Path
) -> None:
    text = " Grüße,\n\n漢字 \n"
    expected = llm.generate(text, EIGHT).text + "\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    assert run("generate", checkpoint, "--prompt-file", tmp_path / "prompt.txt", *N).stdout == expected
    assert run("generate", checkpoint, "--prompt-file", "-", *N, stdin=text.encode()).stdout == expected


def test_chat_wraps_the_prompt(run, checkpoint: Path, llm: LLM) -> None:
    wrapped = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    expected = llm.generate(wrapped, EIGHT)
    out = run("generate", checkpoint, "--chat", "--prompt", "Hello", *N)
    assert out.stdout == expected.text + "\n"
    assert f"{expected.prompt_tokens} tokens of prompt" in out.stderr


def test_questions_share_one_prefill(run, checkpoint: Path, llm: LLM, monkeypatch) -> None:
    prefills: list[np.ndarray] = []
    real = LLM.prefill
    monkeypatch.setattr(LLM, "prefill", lambda self, ids: (prefills.append(ids), real(self, ids))[1])
    questions = [QUESTION, "Why?"]
    out = run(
        "generate",
        checkpoint,
        "--prompt",
        DOCUMENT,
        "--question",
        questions[0],
        "--question",
        questions[1],
        *N,
    )
    whole = [llm.render([{"role": "user", "content": f"{DOCUMENT}\n\n{q}"}]) for q in questions]
    assert out.stdout == "".join(llm.generate(text, EIGHT).text + "\n" for text in whole)
    assert [len(ids) for ids in prefills] == [len(llm.token_ids(f"<|im_start|>user\n{DOCUMENT}\n\n"))]
    for text, question in zip(whole, questions, strict=True):
        assert f"{len(llm.token_ids(text))} tokens of prompt" in out.stderr
        assert f"> {question}\n" in out.stderr


@pytest.mark.parametrize("way", ["--raw", "no template"])
def test_raw_questions_follow_the_document_directly(
    run, checkpoint: Path, llm: LLM, tmp_path: Path, way: str
) -> None:
    folder, options = checkpoint, ["--raw"]
    if way == "no template":
        folder, options = tiny_checkpoint.write(tmp_path / "plain", chat_template=False), []
    out = run("generate", folder, "--prompt", DOCUMENT, "--question", "\nIt is ", *options, *N)
    assert out.stdout == llm.generate(DOCUMENT + "\nIt is ", EIGHT).text + "\n"


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_a_saved_document_is_asked_later(run, checkpoint: Path, tmp_path: Path, raw: list[str]) -> None:
    saved = tmp_path / "document"
    at_once = run("generate", checkpoint, "--prompt", DOCUMENT, "--question", QUESTION, *raw, *N)
    first = run("generate", checkpoint, "--prompt", DOCUMENT, "--save-prefix", saved, *raw)
    assert (first.code, first.stdout) == (0, "")
    later = run("generate", checkpoint, "--prefix", saved, "--question", QUESTION, *N)
    assert later.code == 0
    assert later.stdout == at_once.stdout


def test_a_saved_document_is_continued(run, checkpoint: Path, llm: LLM, tmp_path: Path) -> None:
    saved = tmp_path / "document"
    run("generate", checkpoint, "--token-ids", ",".join(map(str, range(50))), "--save-prefix", saved)
    out = run("generate", checkpoint, "--prefix", saved, "--token-ids", "50,51", *N)
    want = [str(n) for n in llm.generate(np.arange(52), EIGHT).token_ids]
    assert out.stdout.split() == want
    anew = run("generate", checkpoint, "--prefix", saved, "--token-ids", "50,51", "--anew", *N)
    assert anew.stdout.split() == want
    assert anew.stderr.startswith(f"{saved}: 50 tokens\n52 tokens of prompt")


def test_sampling_options_reach_the_sampler(run, checkpoint: Path, llm: LLM) -> None:
    out = run(
        "generate", checkpoint, "--token-ids", "5,6", "--max-new-tokens", 12, "--ignore-eos", "--temperature", 0.8,
        "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.2, "--seed", 7,
    )  # fmt: skip
    params = SamplingParams(12, 0.8, 50, 0.9, 1.2, seed=7, ignore_eos=True)
    assert out.stdout.split() == [str(n) for n in llm.generate([5, 6], params).token_ids]
    greedy = llm.generate([5, 6], SamplingParams(12, ignore_eos=True)).token_ids
    assert out.stdout.split() != [str(n) for n in greedy]


def test_stop_string_ends_the_answer(run, checkpoint: Path, llm: LLM) -> None:
    text = llm.generate("Once upon", SamplingParams(64, ignore_eos=True)).text
    stop = text[10]
    out = run(
        "generate",
        checkpoint,
        "--prompt",
        "Once upon",
        "--max-new-tokens",
        64,
        "--ignore-eos",
        "--stop",
        stop,
    )
    assert out.stdout == text[: text.index(stop)] + "\n"
    assert "ended by stop" in out.stderr
