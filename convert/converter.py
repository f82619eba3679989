"""`convert`: a Hugging Face folder to an orbax one, and back; one table of parameters serves both ways."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwen_jax.convert.hf_folder import INDEX_FILE, SINGLE_FILE, HfFolder, plan_shards
from qwen_jax.convert.orbax_folder import PARAMS, OrbaxFolder, OrbaxWriter
from qwen_jax.convert.safetensors_io import SafetensorsWriter
from qwen_jax.convert.source import Progress, TensorSource, in_groups, leaf_name, tensors
from qwen_jax.convert.staging import staged
from qwen_jax.errors import CheckpointError
from qwen_jax.params import Param

CONFIG = "config.json"
MAX_SHARD_BYTES = 5 * 10**9
# Leaves are handed to orbax in groups: a call a leaf would be slow, and a group as large as the largest tensor
# would need, with orbax's own copy, all the memory there is for that tensor.
_GROUPS_PER_LARGEST = 4
_LEAST_GROUP_BYTES = 64 << 20


def open_checkpoint(folder: str | Path) -> TensorSource:
    """Opens a Hugging Face folder or a converted one, and checks it against its config.json.

    Raises:
        CheckpointError: neither of the two, or not whole: every problem found is named.
        ConfigError: config.json is missing, broken or asks for something this code does not do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file; give the folder it lies in" if folder.is_file() else "no such folder"
        raise CheckpointError(f"{folder}: {what}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no {CONFIG}: neither a Hugging Face folder nor a converted one")
    converted = (folder / PARAMS).is_dir()
    if converted and any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: holds both safetensors and {PARAMS}/: remove one of them")
    return OrbaxFolder(folder) if converted else HfFolder(folder)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the checkpoint `src` to the new folder `dst` in the other format: Hugging Face to orbax, or
    orbax to Hugging Face.

    Tensors keep every bit. config.json, the tokenizer, generation config and head budgets travel along byte
    for byte. Memory stays under twice the largest tensor, whatever the size of the checkpoint. `dst` appears
    only when it is whole; a run that was killed leaves `<dst>.converting/`, which the next run clears.

    Args:
        src: a Hugging Face folder or a converted one.
        dst: the folder to make; its parent must exist.
        progress: called with (bytes done, bytes in all).
        max_shard_bytes: most bytes in one safetensors file, in the direction that writes them.

    Raises:
        CheckpointError: `src` is not a whole checkpoint, holds NaN or infinity, `dst` exists, or the disk is
        full.
    """
    source, dst = open_checkpoint(src), Path(dst).absolute()
    with staged(dst) as out:
        try:
            if isinstance(source, HfFolder):
                _write_orbax(source, out, progress)
            else:
                _write_hf(source, out, progress, max_shard_bytes)
            _copy_companions(source.folder, out)
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(_write_failure(dst, error)) from error


def _write_orbax(source: TensorSource, out: Path, progress: Progress | None) -> None:
    config, itemsize = source.config, source.dtype.itemsize
    sizes = {leaf_name(p, n): math.prod(p.shape(config)) * itemsize for p, n in tensors(config)}
    stream = _streamed(source, progress)
    writer = OrbaxWriter(out, config, source.dtype)
    limit = max(max(sizes.values()) // _GROUPS_PER_LARGEST, _LEAST_GROUP_BYTES)
    for names in in_groups(sizes, limit):
        writer.write({name: next(stream)[2] for name in names})
    writer.finish()


def _write_hf(source: TensorSource, out: Path, progress: Progress | None, max_shard_bytes: int) -> None:
    config, itemsize = source.config, source.dtype.itemsize
    shapes = {p.hf_name(layer): p.hf_shape(config) for p, layer in tensors(config)}
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    stream = _streamed(source, progress)
    plan = plan_shards(sizes, max_shard_bytes)
    for file, names in plan.items():
        with SafetensorsWriter(out / file, {name: shapes[name] for name in names}, source.dtype) as writer:
            for name in names:
                _, _, array = next(stream)
                writer.write(name, array.reshape(shapes[name]))
    if list(plan) != [SINGLE_FILE]:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in plan.items() for name in names},
        }
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _streamed(
    source: TensorSource, progress: Progress | None
) -> Iterator[tuple[Param, int | None, np.ndarray]]:
    total = sum(math.prod(p.shape(source.config)) * source.dtype.itemsize for p, _ in tensors(source.config))
    done = 0
    for param, layer in tensors(source.config):
        array = source.read(param, layer)
        done += array.nbytes
        yield param, layer, array
        del array
        if progress:
            progress(done, total)


def _copy_companions(src: Path, out: Path) -> None:
    """Copies all that is not weights; config.json comes last: without it a folder is not a checkpoint."""
    files = [p for p in sorted(src.iterdir()) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in files if not p.name.endswith(".safetensors") and p.name != INDEX_FILE]
    for path in sorted(files, key=lambda p: p.name == CONFIG):
        shutil.copyfile(path, out / path.name)


def _write_failure(dst: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    if full:
        return f"{dst}: the disk is full; nothing was kept: free some space and convert again"
    return f"{dst}: writing failed, nothing was kept: {text[:300]}"
