"""A prefilled document on disk: keys and values by layer as safetensors, and a JSON file that says whose they are.

Only the document's own positions are written, layer by layer, so host memory holds one layer at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.cache import KVCache
from qwen_jax.config import read_json
from qwen_jax.context import Document
from qwen_jax.convert.safetensors_io import TAGS, SafetensorsWriter, read_box, read_header
from qwen_jax.convert.staging import staged
from qwen_jax.errors import CheckpointError
from qwen_jax.model import Qwen2
from qwen_jax.processes import fetch

_META = "document.json"
# Of what the files hold. 2: keys and values in one file. 1, without the number: keys of 16 bits not mixed, other factors
# of 8-bit ones.
_FORMAT = 3
_KEYS, _VALUES, _SCALES = (  # a file has one dtype; scales are of 8-bit caches
    "keys.safetensors",
    "values.safetensors",
    "scales.safetensors",
)


def owner(model: Qwen2) -> dict[str, object]:
    """What a cache depends on: the config, and a digest of a few small tensors."""
    digest, k = hashlib.sha256(), model.layers.attn.k
    channels = k.weight[..., 0] if k.scale is None else k.scale[...]  # all: `balance` may have changed any
    for array in (
        channels,
        model.layers.input_norm.weight[...],
        model.norm.weight[...],
    ):
        digest.update(np.ascontiguousarray(fetch(array).astype(np.float32)).tobytes())
    return {"config": _plain(dataclasses.asdict(model.config)), "weights": digest.hexdigest()}


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))


def save(document: Document, path: Path) -> None:
    """Writes the document; see `Document.save`."""
    if jax.process_count() > 1:
        raise CheckpointError(
            f"{path}: a document that is spread over several processes cannot be saved: save it from one"
        )
    cache, length, slots = document.cache, len(document), document.slots()
    meta = {
        "format": _FORMAT, "owner": document.owner, "dtype": cache.dtype.name, "token_ids": document.token_ids.tolist(),
    }  # fmt: skip
    with staged(path.absolute()) as out:
        try:
            for file, buffers in _files(cache).items():
                layers, _, heads, _, *rest = buffers[0][1].shape
                names = [f"{kind}.{layer}" for layer in range(layers) for kind, _ in buffers]
                shapes = dict.fromkeys(names, (heads, length, *rest))
                with SafetensorsWriter(out / file, shapes, buffers[0][1].dtype) as writer:
                    for layer in range(layers):
                        for kind, buffer in buffers:
                            writer.write(f"{kind}.{layer}", np.asarray(buffer[layer, 0])[:, slots])
            (out / _META).write_text(json.dumps(meta), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: the document could not be written: {error.strerror}") from None


def load(path: Path, model: Qwen2, dtype: np.dtype, new_cache: Callable[[int], KVCache]) -> Document:
    """Reads a document into a cache that `new_cache(tokens)` allocates; see `LLM.load_prefix`."""
    if not (path / _META).is_file():
        raise CheckpointError(f"{path}: not a saved document: it holds no {_META}")
    meta = read_json(path / _META)
    mine = owner(model)
    try:
        theirs, token_ids = meta["owner"], np.asarray(meta["token_ids"], np.int32)
        if (found := meta.get("format", 1)) != _FORMAT:
            raise CheckpointError(
                f"{path}: saved by another version of qwen-jax (format {found}, not {_FORMAT}): prefill the document again"
            )
        if theirs["config"] != mine["config"]:
            fields = sorted(k for k, v in mine["config"].items() if theirs["config"].get(k) != v)  # type: ignore[attr-defined]
            raise CheckpointError(f"{path}: made with another model: its {', '.join(fields)} differ")
        if meta["dtype"] != dtype.name:
            raise CheckpointError(
                f"{path}: its cache is {meta['dtype']}, this one {dtype.name}: pass kv_dtype={meta['dtype']!r}"
            )
        if theirs["weights"] != mine["weights"]:
            raise CheckpointError(
                f"{path}: made with other weights of the same shape: prefill the document again"
            )
    except CheckpointError:
        raise
    except (TypeError, KeyError, AttributeError, OverflowError, ValueError):
        raise CheckpointError(f"{path / _META}: not the description of a saved document") from None
    if not len(token_ids) or token_ids.min() < 0 or token_ids.max() >= model.config.vocab_size:
        raise CheckpointError(f"{path / _META}: its token ids are empty or outside the vocabulary")
    document = Document(new_cache(len(token_ids)), token_ids, mine, model.spread)
    slots, files = document.slots(), _files(document.cache)
    found = {file: read_header(path / file) for file in files}
    for layer in range(model.config.num_layers):
        parts = {}
        for file, buffers in files.items():
            for kind, buffer in buffers:
                held, name = buffer.shape[2:], f"{kind}.{layer}"
                shape = (held[0], len(token_ids), *held[2:])
                info = found[file].get(name)
                dtypes = _readable(kind, buffer.dtype)
                if info is None or info.shape != shape or TAGS.get(info.tag) not in dtypes:
                    raise CheckpointError(
                        f"{path / file}: tensor {name} is missing or is not {' or '.join(dtypes)} {list(shape)}"
                    )
                part = np.zeros(held, buffer.dtype)
                part[:, slots] = read_box(info, shape, tuple((0, n) for n in shape))
                parts[kind] = jnp.asarray(part)
        document.cache = _put_layer(document.cache, KVCache(**parts), jnp.int32(layer))
    return document


def _files(cache: KVCache) -> dict[str, list[tuple[str, jax.Array]]]:
    """The files of a cache, and the names and buffers that each holds layer by layer."""
    files = {_KEYS: [("k", cache.k)], _VALUES: [("v", cache.v)]}
    if cache.k_scale is not None and cache.v_scale is not None:
        files[_SCALES] = [("k_scale", cache.k_scale), ("v_scale", cache.v_scale)]
    return files


def _readable(kind: str, dtype: np.dtype) -> tuple[str, ...]:
    """What is read into a buffer of this dtype: of 16-bit keys either kind, for a TPU's are others than a GPU's."""
    pair = "bfloat16", "float16"
    return pair if kind == "k" and dtype.name in pair else (dtype.name,)


def _put(cache: KVCache, entry: KVCache, layer: jax.Array) -> KVCache:
    """Writes one row's keys and values of one layer, [K, S, ...], from position 0 on."""

    def write(buffer: jax.Array, x_KS: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(buffer, x_KS[None, None], (layer, 0, 0, 0, 0)[: buffer.ndim])

    return jax.tree.map(write, cache, entry)


_put_layer = jax.jit(_put, donate_argnums=0)
