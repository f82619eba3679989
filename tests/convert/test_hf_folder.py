"""Every way a Hugging Face folder can be wrong, and the one line that says so."""

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.convert.converter import open_checkpoint
from qwen_jax.convert.hf_folder import plan_shards
from qwen_jax.convert.source import tensors
from qwen_jax.convert.synthetic import TINY
from qwen_jax.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder.name) in str(caught.value)


def set_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_good_folder_opens(hf_folder, sharded, tied):
    source = open_checkpoint(hf_folder(sharded=sharded, tie_word_embeddings=tied))
    names = {source.name(param, layer) for param, layer in tensors(source.config)}
    assert Q0 in names
    assert ("lm_head.weight" in names) == (not tied)


def test_missing_tensor(hf_folder, edit):
    folder = hf_folder()
    edit(folder, lambda t: t.pop(Q0))
    refused(folder, rf"missing {Q0}$")


def test_missing_head_names_the_config_key(hf_folder, edit):
    folder = hf_folder()
    edit(folder, lambda t: t.pop("lm_head.weight"))
    refused(folder, r"missing lm_head.weight \(tie_word_embeddings is false")


def test_extra_tensor(hf_folder, edit):
    folder = hf_folder()
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": t[Q0]}))
    refused(folder, "q_norm.weight not part of the model")


def test_fewer_layers_in_config_than_in_the_file(hf_folder):
    folder = hf_folder()
    set_config(folder, num_hidden_layers=2)
    refused(folder, r"model\.layers\.2\..* and 9 more not part of the model")


def test_more_layers_in_config_than_in_the_file(hf_folder):
    folder = hf_folder()
    set_config(folder, num_hidden_layers=4)
    refused(folder, r"missing model\.layers\.3\..* and 9 more$")


def test_misshaped_tensor_and_vocabulary(hf_folder, edit):
    folder = hf_folder()
    edit(folder, lambda t: t.update({Q0: np.ascontiguousarray(t[Q0][:16])}))
    refused(folder, rf"{Q0} is \[16, 32\] where config.json says \[32, 32\]")
    folder = hf_folder("other")
    set_config(folder, vocab_size=90)
    refused(folder, r"embed_tokens.weight is \[96, 32\] where config.json says \[90, 32\]")


def test_all_problems_are_reported_together(hf_folder, edit):
    folder = hf_folder()

    def spoil(t):
        t.pop("model.norm.weight")
        t["surplus"] = t[Q0]
        t[Q0] = np.ascontiguousarray(t[Q0][:4])

    edit(folder, spoil)
    refused(folder, r"missing model.norm.weight; surplus not part .*; .*q_proj.weight is \[4, 32\]")


def test_wrong_dtype(hf_folder, edit):
    folder = hf_folder()
    edit(folder, lambda t: t.update({Q0: t[Q0].astype(np.float32)}))
    refused(folder, rf"{Q0} stored as float32 where config.json says bfloat16")
    folder = hf_folder("quantised")
    edit(folder, lambda t: t.update({Q0: np.zeros(t[Q0].shape, np.int8)}))
    refused(folder, rf"{Q0} stored as int8 where config.json says bfloat16")


@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_file(hf_folder, sharded):
    folder = hf_folder(sharded=sharded)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, rf"{file.name} is truncated: \d+ bytes where its header promises \d+")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nan_and_infinity(hf_folder, edit, value, dtype):
    folder = hf_folder(torch_dtype=dtype)

    def spoil(t):
        t[Q0][5, 7] = value

    edit(folder, spoil)
    source = open_checkpoint(folder)
    param = next(p for p, layer in tensors(source.config) if p.hf_name(layer) == Q0)
    with pytest.raises(CheckpointError, match=f"tensor {Q0} holds NaN or infinity"):
        source.read(param, 0)
    whole = tuple(slice(None) for _ in param.letters)
    clean = source.read(param, 0, (slice(1, 4), *whole[1:]))  # heads that do not hold the bad value
    assert np.isfinite(clean.astype(np.float32)).all()
    source.read(param, 1)


@pytest.mark.parametrize("largest", [np.float32(3.3e38), np.float32(-3.3e38)])
def test_the_largest_finite_values_pass(hf_folder, edit, largest):
    folder = hf_folder()
    edit(folder, lambda t: t["model.norm.weight"].fill(largest))
    source = open_checkpoint(folder)
    param = next(p for p, _ in tensors(source.config) if p.path == "norm.weight")
    assert (abs(source.read(param).astype(np.float32)) > 3e38).all()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors", "..\\x.safetensors", "..", 7]
)  # fmt: skip
def test_index_that_leaves_the_folder(hf_folder, tmp_path, name):
    folder = hf_folder(sharded=True)
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], tmp_path / "outside.safetensors")
    set_index(folder, lambda weight_map: weight_map.update({Q0: name}))
    refused(folder, f"{INDEX}: weight_map names .* not a file of this folder")


def test_index_that_names_a_pickle(hf_folder):
    folder = hf_folder(sharded=True)
    set_index(folder, lambda weight_map: weight_map.update({Q0: "pytorch_model.bin"}))
    refused(folder, "weight_map names 'pytorch_model.bin'; only .safetensors")


def test_link_out_of_the_folder(hf_folder, tmp_path):
    folder = hf_folder(sharded=True)
    file = sorted(folder.glob("*.safetensors"))[0]
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, f"{file.name} links out of its folder")


def test_links_of_the_hub_cache_are_followed(hf_folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in hf_folder(sharded=True).iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    open_checkpoint(snapshot)


def test_index_and_files_disagree(hf_folder):
    folder = hf_folder(sharded=True)
    last = sorted(folder.glob("*.safetensors"))[-1].name
    set_index(folder, lambda weight_map: weight_map.update({Q0: last}))
    refused(folder, f"{Q0} is in model-0000.*safetensors where {INDEX} says {last}")


def test_tensor_stored_in_two_files(hf_folder):
    folder = hf_folder(sharded=True)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    refused(folder, f"stored both in {first.name} and in {second.name}")


def test_broken_or_empty_index(hf_folder):
    folder = hf_folder(sharded=True)
    (folder / INDEX).write_text("{")
    refused(folder, f"{INDEX}: broken JSON")
    (folder / INDEX).write_text('{"weight_map": {}}')
    refused(folder, "no weight_map")


def test_shard_that_is_not_there(hf_folder):
    folder = hf_folder(sharded=True)
    sorted(folder.glob("*.safetensors"))[0].unlink()
    refused(folder, "no such file, though .* names it: the download is incomplete")


def test_shards_without_index_and_strays(hf_folder):
    folder = hf_folder(sharded=True)
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "model.safetensors")
    refused(folder, f"model.safetensors not named by {INDEX}")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).unlink()
    refused(folder, f"without {INDEX}: the download is incomplete")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.pkl"])
def test_pickled_weights_are_never_read(hf_folder, name):
    folder = hf_folder()
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, f"only pickled weights \\({name}\\)")


def test_no_weights_no_config_no_folder(hf_folder, tmp_path):
    folder = hf_folder()
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")
    refused(tmp_path / "absent", "absent: no such folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file; give the folder")


def test_broken_config_and_another_model(hf_folder):
    folder = hf_folder()
    (folder / "config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    with pytest.raises(ConfigError, match="model_type is 'llama'"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="broken JSON"):
        open_checkpoint(folder)


def test_stored_head_of_a_tied_model(hf_folder, edit):
    folder = hf_folder(tie_word_embeddings=True)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    open_checkpoint(folder)

    def spoil(t):
        t["lm_head.weight"][3, 3] += 1

    edit(folder, spoil)
    refused(folder, "lm_head.weight differs from the embedding although config.json says tie_word_embeddings")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_shard_plan(sizes, limit):
    names = {f"t{i}": size for i, size in enumerate(sizes)}
    plan = plan_shards(names, limit)
    assert [name for group in plan.values() for name in group] == list(names)
    for group in plan.values():
        assert len(group) == 1 or sum(names[name] for name in group) <= limit
    groups = list(plan.values())
    for group, following in itertools.pairwise(groups):
        assert sum(names[name] for name in group) + names[following[0]] > limit
    assert list(plan) == sorted(plan)
