"""Several processes that run one model together: joining them, and what each may do alone.

Every process runs the same program on the same prompts; arrays are spread over the devices of all. Small results (tokens,
logits) lie whole on every device, so that each process reads its own copy.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from qwen_jax.errors import QwenJaxError

# A process that is gone is noticed after this long; then the runtime ends the others. JAX's own value is 100.
HEARTBEAT_SECONDS = 30
_SHUTDOWN_SECONDS = 60
_INITIALIZATION_SECONDS = 300


class ProcessError(QwenJaxError):
    """Processes that cannot be joined."""


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several; call it before anything else touches JAX.

    Under Slurm, Open MPI, Kubernetes (JobSet) and on Cloud TPUs JAX finds everything by itself. If a process dies the
    others end with an error within a minute.

    Args:
        coordinator: host:port of process 0; default: JAX_COORDINATOR_ADDRESS or what the cluster says.
        processes, process: how many there are and which this is; default: what the cluster says.

    Raises:
        QwenJaxError: nothing says how many processes there are, or they do not find each other.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=_INITIALIZATION_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ProcessError(
            f"the processes could not be joined ({error!s:.200}): outside a cluster that JAX knows give the coordinator's "
            "host:port, the number of processes and which this is"
        ) from None


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return jax.process_index() == 0


def replicated(arrays: Any, where: NamedSharding | None) -> Any:
    """A pytree of host arrays, the same in every process, on all devices of `where`, or on the default one if that is None.

    Compiles nothing.
    """
    if where is None:
        return jax.device_put(arrays)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), arrays
    )


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array on the host, also where other processes hold parts of it; then all of them must call this."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
