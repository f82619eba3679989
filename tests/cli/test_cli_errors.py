"""What a user can get wrong: one line on stderr, exit code 2, nothing on stdout, no traceback, nothing lost."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
from safetensors.numpy import load_file, save_file

from qwen_jax.errors import QwenJaxError

Q = "model.layers.0.self_attn.q_proj.weight"
ASK = ("--token-ids", "1,2,3", "--max-new-tokens", 2)


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Callable[[Callable[[Path], object]], Path]:
    """A copy of the checkpoint with something done to it."""

    def make(change: Callable[[Path], object]) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(checkpoint, folder)
        change(folder)
        return folder

    return make


def edit_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def shorten(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def index_outside(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "../other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CHECKPOINTS = {
    "missing tensor": (edit_tensors(lambda t: t.pop(Q)), f"missing {Q}"),
    "extra tensor": (
        edit_tensors(lambda t: t.update(extra=np.zeros(2, np.float32))),
        "extra not part of the model",
    ),
    "wrong shape": (edit_tensors(lambda t: t.update({Q: np.zeros((3, 4), np.float32)})), r"is \[3, 4\]"),
    "wrong dtype": (edit_tensors(lambda t: t.update({Q: t[Q].astype(np.float16)})), "float16"),
    "NaN": (edit_tensors(lambda t: t[Q].__setitem__((0, 0), np.nan)), f"{Q} holds NaN"),
    "truncated": (shorten, "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "pickle": (pickled, "pytorch_model.bin"),
    "index outside": (index_outside, r"\.\./other\.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "broken JSON"),
    "other model": (edit_json("config.json", model_type="llama"), "'llama'"),
    "unknown rope": (edit_json("config.json", rope_scaling={"type": "ntk"}), "'ntk'"),
    "sliding window": (edit_json("config.json", use_sliding_window=True), "use_sliding_window"),
    "quantised": (edit_json("config.json", quantization_config={"bits": 4}), "quantization_config"),
    "disagrees": (edit_json("config.json", hidden_size=64), "config.json says"),
    "generation config": (edit_json("generation_config.json", num_beams=4), "num_beams"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_checkpoint(refused, damaged, damage: str) -> None:
    change, message = CHECKPOINTS[damage]
    folder = damaged(change)
    line = refused("generate", folder, *ASK)
    assert str(folder) in line
    assert re.search(message, line)


@pytest.mark.parametrize("damage", ["missing tensor", "no config", "pickle", "unknown rope"])
@pytest.mark.parametrize("command", ["info", "chat", "convert"])
def test_every_command_refuses_a_broken_checkpoint(
    refused, damaged, tmp_path: Path, command: str, damage: str
) -> None:
    folder = damaged(CHECKPOINTS[damage][0])
    assert str(folder) in refused(command, folder, *([tmp_path / "out"] if command == "convert" else []))
    assert not (tmp_path / "out").exists()


REQUESTS = {
    "empty prompt": (["--prompt", ""], "the prompt is empty"),
    "no ids": (["--token-ids", ""], "the prompt is empty"),
    "id too large": (["--token-ids", "1,264"], "token id 264 is outside the vocabulary of 264"),
    "negative id": (["--token-ids", "-1"], "token id -1 is outside the vocabulary"),
    "not an id": (["--token-ids", "1,x"], "'x' is not a token id"),
    "too long": (["--prompt", "abc", "--max-len", "10", "--max-new-tokens", "8"], "do not fit max_len=10"),
    "document too long": (
        ["--prompt", "abc" * 9, "--question", "b", "--raw", "--max-len", "28"],
        "do not fit max_len=28",
    ),
    "max_len": (["--prompt", "abc", "--max-len", "0"], "max_len must be at least 1"),
    "beyond the positions": (
        ["--prompt", "abc", "--max-len", "4096", "--dca", "none"],
        "beyond the 2048 positions",
    ),
    "no prompt": ([], "nothing to answer"),
    "two prompts": (["--prompt", "a", "--token-ids", "1"], "--prompt and --token-ids: give one"),
    "ids and question": (["--token-ids", "1", "--question", "a"], "--token-ids goes with neither"),
    "chat and question": (["--prompt", "a", "--chat", "--question", "b"], "--chat is for a prompt alone"),
    "empty question": (["--prompt", "a", "--question", " "], "the question is empty"),
    "lonely prefix": (["--prefix", "x"], "--prefix needs a --question"),
    "anew without a prefix": (["--prompt", "a", "--anew"], "--anew goes with --prefix"),
    "no such prefix": (["--prefix", "nowhere", "--question", "a"], "nowhere: not a saved document"),
    "no file": (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt: No such file"),
    "a folder": (["--prompt-file", "."], "--prompt-file .: Is a directory"),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "temperature"),
    "greedy and top-k": (["--prompt", "a", "--greedy", "--top-k", "5"], "greedy"),
    "top-p": (["--prompt", "a", "--top-p", "1.5"], "top_p"),
    "top-k": (["--prompt", "a", "--top-k", "-5"], "top_k"),
    "penalty": (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty"),
    "no new tokens": (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens"),
    "empty stop": (["--prompt", "a", "--stop", ""], "stop"),
    "dtype": (["--prompt", "a", "--dtype", "int4"], "--dtype 'int4' is not one of"),
    "kv dtype": (["--prompt", "a", "--kv-dtype", "int4"], "kv_dtype='int4'"),
    "weight dtype": (["--prompt", "a", "--weight-dtype", "int4"], "weight_dtype='int4'"),
    "sparsity": (["--prompt", "a", "--sparsity", "guessing"], "sparsity='guessing'"),
    "dca": (["--prompt", "a", "--dca", "16,64"], "0 < local_size < chunk_size"),
    "mesh": (["--prompt", "a", "--mesh", "tensor=3"], "tensor=3 does not divide"),
    "chunk": (["--prompt", "a", "--prefill-chunk", "0"], "prefill_chunk must be at least 1"),
    "unknown option": (["--prompt", "a", "--beams", "4"], "--beams"),
    "not a number": (["--prompt", "a", "--top-k", "many"], "'--top-k'"),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_request(
    refused, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request_: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = REQUESTS[request_]
    assert message in refused("generate", checkpoint, *options)


def test_text_needs_a_tokenizer_and_a_chat_a_template(refused, tmp_path: Path) -> None:
    bare = tiny_checkpoint.write(tmp_path / "bare", tokenizer=False)
    plain = tiny_checkpoint.write(tmp_path / "plain", chat_template=False)
    assert "no tokenizer" in refused("generate", bare, "--prompt", "a")
    assert "no tokenizer" in refused("chat", bare)
    assert "no chat template" in refused("chat", plain)
    assert "no chat template" in refused("generate", plain, "--chat", "--prompt", "a")


def test_prompt_file_that_is_not_text(refused, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    assert "prompt: not UTF-8 text: byte 3 is 0xff" in refused(
        "generate", checkpoint, "--prompt-file", tmp_path / "prompt"
    )
    assert "standard input: not UTF-8" in refused("generate", checkpoint, "--prompt-file", "-", stdin=b"\xff")


def test_documents_are_not_overwritten_nor_taken_for_others(
    refused, run, checkpoint: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    assert "exists already" in refused("generate", checkpoint, "--prompt", "a", "--save-prefix", saved)
    assert list(saved.iterdir()) == []
    assert run("generate", checkpoint, "--prompt", "abc", "--save-prefix", tmp_path / "doc").code == 0
    line = refused("generate", checkpoint, "--dca", "none", "--prefix", tmp_path / "doc", "--question", "a")
    assert "another model: its dual_chunk differ" in line


def test_no_such_folder(refused) -> None:
    for command in (
        ["info"],
        ["chat"],
        ["generate", "--prompt", "a"],
        ["plan", "--context", 9, "--devices", "h200:1"],
    ):
        assert "/nowhere/at/all: no such folder" in refused(command[0], "/nowhere/at/all", *command[1:])


def test_usage(refused) -> None:
    assert "Missing argument 'PATH'" in refused("info")
    assert "(see qwen-jax info --help)" in refused("info")
    assert "No such command 'genrate'. Did you mean 'generate'?" in refused("genrate")


def test_convert_keeps_what_is_there(refused, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("precious")
    assert "exists already" in refused("convert", checkpoint, tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "precious"
    assert "no such folder" in refused("convert", checkpoint, tmp_path / "not" / "there")
    assert "--max-shard-size 'big'" in refused(
        "convert", checkpoint, tmp_path / "new", "--max-shard-size", "big"
    )
    assert not (tmp_path / "new").exists()


def test_convert_to_a_full_disk(refused, run, checkpoint: Path, monkeypatch, tmp_path: Path) -> None:
    from qwen_jax.convert.safetensors_io import SafetensorsWriter

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert run("convert", checkpoint, tmp_path / "orbax").code == 0
    monkeypatch.setattr(SafetensorsWriter, "write", full)
    assert "the disk is full" in refused("convert", tmp_path / "orbax", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orbax"]


@pytest.mark.parametrize("command", [["info"], ["generate", "--prompt", "a"]])
def test_download_that_breaks_off(refused, monkeypatch, command: list[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("reset by peer\nafter 5 bytes")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    line = refused(command[0], "Some/Model", *command[1:])
    assert line == (
        "Some/Model: download incomplete (reset by peer after 5 bytes); run the same command again to resume"
    )


def test_plan_values(refused, checkpoint: Path) -> None:
    assert "abacus" in refused("plan", checkpoint, "--context", 9, "--devices", "abacus:1")
    assert "context" in refused("plan", checkpoint, "--context", 0, "--devices", "h200:1")
    assert "density" in refused("plan", checkpoint, "--context", 9, "--devices", "h200:1", "--density", 2)


def test_debug_lets_the_traceback_through(run) -> None:
    with pytest.raises(QwenJaxError, match="no such folder"):
        run("--debug", "info", "/nowhere/at/all")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore",
            1,
            "the device is out of memory: lower --max-len",
        ),
        ("INTERNAL: broken", 1, "the device failed (INTERNAL: broken)"),
    ],
)
def test_what_the_device_refuses(
    run, checkpoint: Path, monkeypatch, error: str, code: int, message: str
) -> None:
    import jax

    from qwen_jax.llm import LLM

    def fail(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError(error)

    monkeypatch.setattr(LLM, "run_context", fail)
    out = run("generate", checkpoint, *ASK)
    assert (out.code, out.stdout, out.stderr.count("\n")) == (code, "", 1)
    assert message in out.stderr


def test_a_bug_is_not_hidden(run, checkpoint: Path, monkeypatch) -> None:
    from qwen_jax.llm import LLM

    monkeypatch.setattr(LLM, "run_context", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("generate", checkpoint, *ASK)


def test_ctrl_c_leaves_quietly(run, checkpoint: Path, monkeypatch) -> None:
    from qwen_jax.llm import LLM

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "run_context", interrupted)
    out = run("generate", checkpoint, *ASK)
    assert (out.code, out.stdout, out.stderr) == (130, "", "")
