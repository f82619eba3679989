"""`convert`: a Hugging Face folder to an orbax one, and back; one table of parameters serves both ways."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from qwen_jax.convert.hf_folder import PICKLED, HfFolder, plan_shards, write_index
from qwen_jax.convert.orbax_folder import PARAMS, OrbaxFolder, OrbaxWriter
from qwen_jax.convert.safetensors_io import SafetensorsWriter
from qwen_jax.convert.source import Progress, TensorSource, in_groups, leaf_name, tensor_bytes, tensors
from qwen_jax.convert.staging import staged
from qwen_jax.errors import CheckpointError
from qwen_jax.hub import resolve

# The weights themselves, and copies of them in formats that are not read here.
_WEIGHTS = (".safetensors", *PICKLED, ".gguf", ".h5", ".msgpack", ".onnx")
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
    try:
        return OrbaxFolder(folder) if converted else HfFolder(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Converts a checkpoint: a Hugging Face folder to an orbax one, or back, by what `src` is.

    Tensors keep every bit. config.json, the tokenizer, generation config and head budgets travel along byte
    for byte. Memory stays under twice the largest tensor plus 1 GB, whatever the size of the checkpoint.
    `dst` appears only when it is whole; a run that was killed leaves `<dst>.writing/`, which the next run
    clears before it starts afresh.

    Args:
        src: a Hugging Face folder, a converted one, or a hub id.
        dst: the folder to make; its parent must exist.
        progress: called with (bytes done, bytes in all).
        max_shard_bytes: most bytes in one safetensors file, in the direction that writes them.

    Raises:
        CheckpointError: `src` is not a whole checkpoint, holds NaN or infinity, `dst` exists, or the disk is
        full.
    """
    source, dst = open_checkpoint(resolve(src)), Path(dst).expanduser().absolute()
    with staged(dst) as out:
        _require_space(source, dst)
        try:
            if isinstance(source, HfFolder):
                _write_orbax(source, out, progress)
            else:
                _write_hf(source, out, progress, max_shard_bytes)
            _copy_companions(source.folder, out)
        except OSError as error:
            raise CheckpointError(_write_failure(dst, error)) from error


def _write_orbax(source: TensorSource, out: Path, progress: Progress | None) -> None:
    todo = {leaf_name(p, layer): (p, layer) for p, layer in tensors(source.config)}
    sizes = {name: tensor_bytes(source, p) for name, (p, _) in todo.items()}
    limit = max(max(sizes.values()) // _GROUPS_PER_LARGEST, _LEAST_GROUP_BYTES)
    writer = OrbaxWriter(out, source.config, source.dtype)
    done, total = 0, sum(sizes.values())
    for names in in_groups(sizes, limit):
        writer.write({name: source.read(*todo[name]) for name in names})
        done += sum(sizes[name] for name in names)
        if progress:
            progress(done, total)
    writer.finish()


def _write_hf(source: TensorSource, out: Path, progress: Progress | None, max_shard_bytes: int) -> None:
    todo = {p.hf_name(layer): (p, layer) for p, layer in tensors(source.config)}
    sizes = {name: tensor_bytes(source, p) for name, (p, _) in todo.items()}
    shapes = {name: p.hf_shape(source.config) for name, (p, _) in todo.items()}
    done, total = 0, sum(sizes.values())
    plan = plan_shards(sizes, max_shard_bytes)
    for file, names in plan.items():
        with SafetensorsWriter(out / file, {name: shapes[name] for name in names}, source.dtype) as writer:
            for name in names:
                writer.write(name, source.read(*todo[name]).reshape(shapes[name]))
                done += sizes[name]
                if progress:
                    progress(done, total)
    write_index(out, plan, total)


def _copy_companions(src: Path, out: Path) -> None:
    """Copies all that is not weights; config.json comes last: without it a folder is not a checkpoint."""
    files = [p for p in sorted(src.iterdir()) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in files if p.suffix not in _WEIGHTS and not p.name.endswith(".index.json")]
    for path in sorted(files, key=lambda p: p.name == CONFIG):
        with path.open("rb") as original, (out / path.name).open("xb") as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _require_space(source: TensorSource, dst: Path) -> None:
    """Refuses at once what is bound to fill the disk, instead of after an hour."""
    needed = sum(tensor_bytes(source, p) for p, _ in tensors(source.config))
    free = shutil.disk_usage(dst.parent).free
    if free < needed:
        raise CheckpointError(
            f"{dst}: the disk is too full: {needed / 1e9:.3g} GB are needed there and {free / 1e9:.3g} GB are free"
        )


def _write_failure(dst: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{dst}: the disk is full; nothing was kept: free some space and convert again"
    return f"{dst}: writing failed, nothing was kept: {error.strerror or error}"
