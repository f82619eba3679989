"""A Hugging Face folder: config.json, safetensors in one file or several with an index, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from qwen_jax.config import ModelConfig, read_json
from qwen_jax.convert.safetensors_io import TAGS, TensorInfo, read_box, read_header
from qwen_jax.convert.source import Box, TensorSource, in_groups, report, summarise, tensors
from qwen_jax.errors import CheckpointError
from qwen_jax.params import Param

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_BYTES = 1 << 23


class HfFolder(TensorSource):
    """Reads a Hugging Face folder; everything the headers tell is checked on opening, and reported together.

    Raises:
        CheckpointError: no safetensors, an index that leaves the folder or disagrees with the files, or
            tensors that are missing, extra, duplicate, truncated, mis-shaped or of another dtype than
            config.json says.
        ConfigError: config.json is missing, broken or asks for something else.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ModelConfig.from_folder(folder))
        files, weight_map = _weight_files(folder)
        problems: list[str] = []
        self._infos = _merged_headers(files, weight_map, problems)
        if not problems:  # a file that cannot be read would be reported again as its missing tensors
            problems = [*self._against_config(), *_against_index(self._infos, weight_map)]
        report(folder, problems)

    def name(self, param: Param, layer: int | None = None) -> str:
        return param.hf_name(layer)

    def _read(self, param: Param, layer: int | None, box: Box, out: np.ndarray | None) -> np.ndarray:
        info = self._infos[param.hf_name(layer)]
        array = read_box(info, param.shape(self.config), box, out)
        self.bytes_read += array.nbytes
        return array

    def _against_config(self) -> Iterator[str]:
        expected = {p.hf_name(layer): p.hf_shape(self.config) for p, layer in tensors(self.config)}
        missing = [name for name in expected if name not in self._infos]
        if missing:
            hint = " (tie_word_embeddings is false in config.json)" if missing == [_HEAD] else ""
            yield f"missing {summarise(missing)}{hint}"
        extra = [name for name in self._infos if name not in expected]
        if self.config.tie_embeddings and _HEAD in extra:
            extra.remove(_HEAD)
            yield from self._stored_tied_head()
        if extra:
            yield f"{summarise(extra)} not part of the model that config.json describes"
        wrong = [
            f"{name} is {list(self._infos[name].shape)} where config.json says {list(shape)}"
            for name, shape in expected.items()
            if name in self._infos and self._infos[name].shape != shape
        ]
        if wrong:
            yield summarise(wrong)
        # The tied head is compared above, and never read again.
        found: dict[str, list[str]] = {}
        for name, info in self._infos.items():
            found.setdefault(TAGS.get(info.tag, info.tag), []).append(name)
        found.pop(self.config.dtype, None)
        for dtype, names in found.items():
            yield f"{summarise(names)} stored as {dtype} where config.json says {self.config.dtype}"

    def _stored_tied_head(self) -> Iterator[str]:
        """Some exporters store a tied model's head too: harmless if it is the embedding, and only then."""
        head, embed = self._infos[_HEAD], self._infos.get(_EMBED)
        if embed is None:
            return
        same = (head.tag, head.shape) == (embed.tag, embed.shape) and (
            head.tag not in TAGS or _same_bytes(head, embed)
        )
        if not same:
            yield "lm_head.weight differs from the embedding although config.json says tie_word_embeddings"


def _same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    with a.file.open("rb") as file_a, b.file.open("rb") as file_b:
        file_a.seek(a.start)
        file_b.seek(b.start)
        for position in range(0, a.nbytes, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, a.nbytes - position)
            if file_a.read(count) != file_b.read(count):
                return False
    return True


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, and the index's tensor -> file map where there is one."""
    present = sorted(path.name for path in folder.iterdir())
    stored = [name for name in present if name.endswith(".safetensors")]
    if INDEX_FILE in present:
        weight_map = _read_index(folder)
        names = sorted(set(weight_map.values()))
        strays = [name for name in stored if name not in names]
        if strays:
            raise CheckpointError(
                f"{folder}: {summarise(strays)} not named by {INDEX_FILE}: "
                "remove what does not belong to the checkpoint"
            )
    elif stored == [SINGLE_FILE]:
        weight_map, names = None, stored
    elif stored:
        raise CheckpointError(
            f"{folder}: {summarise(stored)} without {INDEX_FILE}: the download is incomplete"
        )
    else:
        pickled = [name for name in present if name.endswith(PICKLED)]
        if pickled:
            raise CheckpointError(
                f"{folder}: only pickled weights ({summarise(pickled)}); unpickling runs code from the "
                "file, so only safetensors are read: export the model as safetensors with transformers"
            )
        raise CheckpointError(f"{folder}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")
    files = [folder / name for name in names]
    for file in files:
        _require_inside(folder, file)
    return files, weight_map


def _read_index(folder: Path) -> dict[str, str]:
    index = folder / INDEX_FILE
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map from tensor names to file names")
    for name in weight_map.values():
        plain = isinstance(name, str) and name == PurePosixPath(name).name == PureWindowsPath(name).name
        if not plain or name in ("", ".", ".."):
            raise CheckpointError(
                f"{index}: weight_map names {name!r:.80}, which is not a file of this folder"
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map names {name!r:.80}; only .safetensors files are read")
    return weight_map


def _require_inside(folder: Path, file: Path) -> None:
    """Refuses links out of the folder, save those of the hub's cache, where snapshots link to ../../blobs."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    if not any(file.resolve().is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{file} links out of its folder, to {file.resolve()}: copy the file into the folder"
        )
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no such file, though {INDEX_FILE} names it: the download is incomplete"
        )


def _merged_headers(
    files: list[Path], weight_map: dict[str, str] | None, problems: list[str]
) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for file in files:
        try:
            header = read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        twice = [name for name in header if name in merged]
        if twice:
            problems.append(
                f"{summarise(twice)} stored both in {merged[twice[0]].file.name} and in {file.name}"
            )
        merged.update(header)
    return merged


def _against_index(infos: dict[str, TensorInfo], weight_map: dict[str, str] | None) -> Iterator[str]:
    if weight_map is None:
        return
    moved = [
        f"{name} is in {info.file.name} where {INDEX_FILE} says {weight_map.get(name, 'nothing')}"
        for name, info in infos.items()
        if weight_map.get(name) != info.file.name
    ]
    if moved:
        yield summarise(moved)


def plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Distributes tensors over files as transformers does: in order, a new file where the next tensor would
    overflow.

    Args:
        sizes: bytes by tensor name, in the order of writing.
        max_shard_bytes: most bytes of tensors in a file; a larger tensor gets a file of its own.

    Returns:
        Tensor names by file name: model.safetensors alone, or model-00001-of-00004.safetensors and so on.
    """
    groups = in_groups(sizes, max_shard_bytes)
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def write_index(folder: Path, plan: dict[str, list[str]], total_bytes: int) -> None:
    """Writes the index of a plan of several files; one file needs none."""
    if list(plan) == [SINGLE_FILE]:
        return
    weight_map = {name: file for file, names in plan.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
