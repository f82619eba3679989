"""A prefilled document on disk: one safetensors file of keys and values by layer, and a JSON file that says whose they are.

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

from qwen_jax.cache import KVCache, cache_shape
from qwen_jax.config import read_json
from qwen_jax.context import Document
from qwen_jax.convert.safetensors_io import TAGS, SafetensorsWriter, read_box, read_header
from qwen_jax.convert.staging import staged
from qwen_jax.errors import CheckpointError
from qwen_jax.model import Qwen2
from qwen_jax.processes import fetch

_META, _DATA = "document.json", "cache.safetensors"


def owner(model: Qwen2) -> dict[str, object]:
    """What a cache depends on: the config, and a digest of a few small tensors."""
    digest = hashlib.sha256()
    for array in (
        model.layers.attn.k.weight[:, 0, 0],
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
    L, _, K, _, H = cache.k.shape
    names = [f"{kind}.{layer}" for layer in range(L) for kind in ("k", "v")]
    meta = {"owner": document.owner, "dtype": cache.k.dtype.name, "token_ids": document.token_ids.tolist()}
    with staged(path.absolute()) as out:
        try:
            with SafetensorsWriter(
                out / _DATA, dict.fromkeys(names, (K, length, H)), cache.k.dtype
            ) as writer:
                for layer in range(L):
                    for kind, buffer in (("k", cache.k), ("v", cache.v)):
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
        if theirs["config"] != mine["config"]:
            fields = sorted(k for k, v in mine["config"].items() if theirs["config"].get(k) != v)  # type: ignore[attr-defined]
            raise CheckpointError(f"{path}: made with another model: its {', '.join(fields)} differ")
        if theirs["weights"] != mine["weights"]:
            raise CheckpointError(
                f"{path}: made with other weights of the same shape: prefill the document again"
            )
        if meta["dtype"] != dtype.name:
            raise CheckpointError(
                f"{path}: its cache is {meta['dtype']}, this one {dtype.name}: pass kv_dtype={meta['dtype']!r}"
            )
    except CheckpointError:
        raise
    except (TypeError, KeyError, AttributeError, OverflowError, ValueError):
        raise CheckpointError(f"{path / _META}: not the description of a saved document") from None
    if not len(token_ids) or token_ids.min() < 0 or token_ids.max() >= model.config.vocab_size:
        raise CheckpointError(f"{path / _META}: its token ids are empty or outside the vocabulary")
    tensors = read_header(path / _DATA)
    L, _, K, _, H = cache_shape(model.config, 1, 0)
    shape = (K, len(token_ids), H)
    document = Document(new_cache(len(token_ids)), token_ids, mine, model.spread)
    slots, held = document.slots(), (K, document.cache.capacity, H)
    for layer in range(L):
        parts = []
        for name in (f"k.{layer}", f"v.{layer}"):
            found = tensors.get(name)
            if found is None or (found.shape, TAGS.get(found.tag)) != (shape, dtype.name):
                raise CheckpointError(
                    f"{path / _DATA}: tensor {name} is missing or is not {dtype.name} {list(shape)}"
                )
            part = np.zeros(held, dtype)
            part[:, slots] = read_box(tensors[name], shape, tuple((0, n) for n in shape))
            parts.append(jnp.asarray(part))
        document.cache = _put_layer(document.cache, *parts, jnp.int32(layer))
    return document


def _put(cache: KVCache, k_KSH: jax.Array, v_KSH: jax.Array, layer: jax.Array) -> KVCache:
    def write(buffer: jax.Array, x_KSH: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(buffer, x_KSH[None, None], (layer, 0, 0, 0, 0))

    return KVCache(write(cache.k, k_KSH), write(cache.v, v_KSH))


_put_layer = jax.jit(_put, donate_argnums=0)
