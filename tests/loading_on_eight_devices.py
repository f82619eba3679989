"""Loads a checkpoint onto meshes of eight CPU devices; prints as JSON what was read and whether it arrived.

A program of test_loading.py. Arguments: a Hugging Face folder and the folder it converts to.
"""

import json
import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file

from qwen_jax import loading
from qwen_jax.loading import load_params, open_checkpoint
from qwen_jax.params import params

MESHES = {
    "tensor": {"tensor": 4},
    "context,tensor": {"context": 2, "tensor": 4},
    "tensor,data": {"tensor": 2, "data": 4},
    "data": {"data": 8},
}


def bytes_read_by_process() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def owned_bytes(arrays: dict[str, jax.Array]) -> int:
    """Bytes of distinct shards: what the devices of this process hold, copies counted once."""
    total = 0
    for array in arrays.values():
        distinct = {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}
        total += sum(distinct.values())
    return total


def expected(folder: Path) -> dict[str, np.ndarray]:
    """The parameters as the safetensors library reads them, stacked here."""
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    config = open_checkpoint(folder).config
    result = {}
    for param in params(config):
        layers = range(config.num_layers) if param.stacked else [None]
        values = [stored[param.hf_name(layer)].reshape(param.shape(config)) for layer in layers]
        result[param.path] = np.stack(values) if param.stacked else values[0]
    return result


def main() -> None:
    reference = expected(Path(sys.argv[1]))
    report = []
    for kind, folder, collects in (("hf", sys.argv[1], False), ("orbax", sys.argv[2], True)):
        loading._collects = lambda *_, collects=collects: collects  # both ways of stacking layers
        load_params(open_checkpoint(folder))  # imports and compiles
        for name, shape in MESHES.items():
            count = int(np.prod(list(shape.values())))
            mesh = Mesh(np.array(jax.devices()[:count]).reshape(list(shape.values())), tuple(shape))
            source = open_checkpoint(folder)
            before = bytes_read_by_process()
            arrays = jax.block_until_ready(load_params(source, mesh=mesh))
            by_process = bytes_read_by_process() - before
            report.append(
                {
                    "case": f"{kind} {name}",
                    "owned": owned_bytes(arrays),
                    "read": source.bytes_read,
                    "read_by_process": by_process,
                    "equal": all(
                        np.asarray(arrays[path]).tobytes() == x.tobytes() for path, x in reference.items()
                    ),
                    "shards": len(arrays["layers.attn.q.weight"].addressable_shards),
                    "q_shard": list(arrays["layers.attn.q.weight"].addressable_shards[0].data.shape),
                    "down_shard": list(arrays["layers.mlp.down.weight"].addressable_shards[0].data.shape),
                }
            )
    print(json.dumps(report))


if __name__ == "__main__":
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    main()
