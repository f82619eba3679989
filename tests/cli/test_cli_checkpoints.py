"""`convert`, `info` and `plan`: the commands that answer nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_checkpoint
from safetensors.numpy import load_file

from qwen_jax.config import ModelConfig
from qwen_jax.params import num_params
from qwen_jax.plan import plan


def test_convert_there_and_back(run, checkpoint: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "orbax", tmp_path / "back"
    out = run("convert", checkpoint, there)
    assert (out.code, out.stderr) == (0, "")
    assert out.stdout.startswith(f"{there}: converted (orbax), ")
    out = run("convert", there, back, "--max-shard-size", "60kB")
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 1
    assert out.stdout.startswith(f"{back}: Hugging Face ({len(files)} safetensors files), ")
    merged = {name: value for file in files for name, value in load_file(file).items()}
    original = load_file(checkpoint / "model.safetensors")
    assert merged.keys() == original.keys()
    assert all((merged[name] == original[name]).all() for name in original)
    asked = ["--token-ids", "1,2,3", "--max-new-tokens", 4]
    assert run("generate", there, *asked).stdout == run("generate", checkpoint, *asked).stdout


def test_info(run, checkpoint: Path, tmp_path: Path) -> None:
    out = run("info", checkpoint)
    assert (out.code, out.stderr) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in out.stdout.splitlines())
    count = sum(value.size for value in load_file(checkpoint / "model.safetensors").values())
    assert facts["parameters"] == f"{count:,}"
    assert facts["weights"].startswith(f"float32, {4 * count:,} bytes")
    assert facts["format"] == "Hugging Face (1 safetensors file)"
    assert facts["positions"] == (
        "rope, theta 10,000; dual chunk attention, chunk 512, local 128, clip 512; length temperature beyond 512"
    )
    assert facts["tokenizer"] == "ids up to 258, a chat template"
    assert facts["answers"] == "greedy, ended by token 256"


def test_info_of_other_positions(run, tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    folder = tiny_checkpoint.write(
        tmp_path / "yarn",
        tokenizer=False,
        rope_scaling=yarn,
        dual_chunk_attention_config=None,
        tie_word_embeddings=True,
    )
    out = run("info", folder).stdout
    assert "rope, theta 10,000; yarn, factor 4 over 512\n" in out
    assert "output head tied to the embedding" in out
    assert "tokenizer   none\n" in out


def test_info_reads_no_weights(run, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    shutil.copytree(checkpoint, folder)
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:  # the values become NaN: whoever reads them will say so
        stream.seek(header)
        stream.write(b"\xff" * (file.stat().st_size - header))
    assert run("info", folder).code == 0


def test_plan(run, refused, tmp_path: Path) -> None:
    raw = json.loads(SEVEN_B)
    (tmp_path / "config.json").write_text(SEVEN_B)
    config = ModelConfig.from_dict(raw)
    assert num_params(config) == 7_615_616_512
    out = run("plan", tmp_path, "--context", 131072, "--devices", "h200:1")
    assert (out.code, out.stderr) == (0, "")
    made = plan(config, 131072, "h200:1")
    assert made.verdict in out.stdout
    out = run("plan", tmp_path, "--context", 1_010_000, "--devices", "h100:1")
    assert out.code == 2
    assert "KV cache" in out.stdout
    assert out.stderr.startswith("qwen-jax: error: does not fit: needs ")
    assert out.stderr.count("\n") == 1
    out = run(
        "plan", tmp_path, "--context", 131072, "--devices", "h100:8", "--mesh", "context=2,tensor=4", "--kv-dtype", "int8",
        "--weight-dtype", "int8", "--batch", 2, "--density", 0.1, "--prefill-chunk", 8192,
    )  # fmt: skip
    made = plan(
        config, 131072, "h100:8", mesh="context=2,tensor=4", kv_dtype="int8", weight_dtype="int8", batch=2, density=0.1,
        prefill_chunk=8192,
    )  # fmt: skip
    assert made.verdict in out.stdout


SEVEN_B = """{"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 1010000,
"rope_theta": 10000000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "dual_chunk_attention_config":
{"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}}"""


@pytest.mark.parametrize("command", ["plan", "info"])
def test_of_a_hub_id_only_the_config_is_fetched(
    run, checkpoint: Path, monkeypatch, tmp_path: Path, command: str
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        shutil.copy(checkpoint / "config.json", tmp_path / "config.json")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    out = run(command, "Some/Model", *(["--context", 99, "--devices", "h200:1"] if command == "plan" else []))
    assert (out.code, out.stderr) == (0, "")
    assert asked == [("Some/Model", ["config.json"])]
