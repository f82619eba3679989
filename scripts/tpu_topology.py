"""Compiling for TPUs that are not there: libtpu, the TPU's own compiler, takes the name of a topology and needs no TPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# The smallest topology of every generation.
SMALLEST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# What libtpu would ask of a TPU machine. ALLOW_MULTIPLE: it is only a compiler here, several processes may load it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def why_no_compiler() -> str | None:
    """Why nothing can be compiled for TPUs here, or None."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu, the TPU compiler, is not installed: uv run --group aot ..."
    return None


@functools.cache
def devices(topology: str) -> list[Any]:
    """The devices of a topology, as "v5p:2x2x1", none of them attached. JAX itself must run on the CPU (JAX_PLATFORMS=cpu)."""
    os.environ.update(_ENVIRONMENT)
    with contextlib.redirect_stderr(io.StringIO()):
        return list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)


def mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of the first devices of a topology: mesh("v5p:2x2x1", context=1, tensor=4)."""
    count = int(np.prod(list(axes.values())))
    chosen = np.array(devices(topology)[:count]).reshape(tuple(axes.values()))
    return Mesh(chosen, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_for_one(topology: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`jit(function, **options)` compiled for one device of a topology; args are trees of ShapeDtypeStructs."""
    one = mesh(topology, x=1)
    here = NamedSharding(one, PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), args)
    with jax.sharding.use_abstract_mesh(one.abstract_mesh):
        return jax.jit(function, **options).lower(*placed).compile()
