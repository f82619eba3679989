"""What the Hopper kernels share: the chip's size, turns and rings on barriers."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu

LOG2E = math.log2(math.e)
SHARED_BYTES = 227 * 1024  # shared memory a block may take
_WARPGROUP = 128
_FIRST_BARRIER = 5  # Mosaic GPU takes barrier 0 and one a warpgroup; 16 exist


def tiled(itemsize: int) -> Any:
    """Transforms of a shared-memory tile as wgmma and TMA want it, swizzled blocks of 8 rows by 128 bytes."""
    # mypy takes jax's empty protocol methods for abstract ones.
    return plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]


@functools.cache
def multiprocessors() -> int:
    """Multiprocessors of the first GPU, or an H200's 132 where there is none (lowering on another machine)."""
    device = jax.devices()[0]
    return int(getattr(device, "core_count", 0) or 132) if device.platform == "gpu" else 132


def why_not_hopper() -> str | None:
    """Why the first device cannot run these kernels, or None."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"runs on NVIDIA Hopper GPUs, not on a {device.platform}"
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return (
            f"runs on NVIDIA Hopper GPUs (compute capability 9.0), not on {device.device_kind} ({capability})"
        )
    return None


def _named_barrier(operation: str, barrier_id: jax.Array, num_threads: int) -> None:
    """`bar.sync` or `bar.arrive` of the PTX barrier `barrier_id`, of which `num_threads` threads take part."""

    # jax's GPU interpreter knows this operation by the names `bar_op`, `operation` and `num_threads`.
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def bar_op(_, barrier_id):  # type: ignore[no-untyped-def]
        mgpu.utils.inline_ptx(
            f"bar.{operation} $0, {num_threads};", barrier_id.registers[()], has_side_effects=True
        )

    bar_op(jnp.asarray(barrier_id, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Turns:
    """Lets `wgs` warpgroups issue their products in turn, 0, 1, ..., 0, so that one's softmax meets others' products."""

    wg: jax.Array
    wgs: int

    def open(self) -> None:
        """Every warpgroup calls this once, first: it gives the first turn to warpgroup 0."""
        pl.when(self.wg == self.wgs - 1)(
            lambda: _named_barrier("arrive", jnp.int32(_FIRST_BARRIER), 2 * _WARPGROUP)
        )

    def take(self) -> None:
        """Waits for the turn."""
        _named_barrier("sync", _FIRST_BARRIER + self.wg, 2 * _WARPGROUP)

    def give(self) -> None:
        """Passes the turn on."""
        _named_barrier("arrive", _FIRST_BARRIER + lax.rem(self.wg + 1, jnp.int32(self.wgs)), 2 * _WARPGROUP)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Tells one producer warp that all `wgs` consumer warpgroups have read a slot of keys or of values.

    `barriers` is None for PTX barriers (no shared memory, one instruction a warp) or a plgpu.Barrier of 2 * stages.
    """

    stages: int
    wgs: int
    barriers: Any = None

    @staticmethod
    def named_fit(stages: int, wgs: int) -> bool:
        """Whether PTX barriers suffice for this ring and the turns of its consumers."""
        return _FIRST_BARRIER + wgs + 2 * stages <= 16

    def _arrive(self, index: jax.Array) -> None:
        if self.barriers is None:
            _named_barrier("arrive", _FIRST_BARRIER + self.wgs + index, self.wgs * _WARPGROUP + 32)
        else:
            plgpu.barrier_arrive(self.barriers.at[index])

    def _wait(self, index: jax.Array) -> None:
        if self.barriers is None:
            _named_barrier("sync", _FIRST_BARRIER + self.wgs + index, self.wgs * _WARPGROUP + 32)
        else:
            plgpu.barrier_wait(self.barriers.at[index])

    def free_key(self, slot: jax.Array) -> None:
        """A consumer warpgroup has read the keys of this slot."""
        self._arrive(slot)

    def free_value(self, slot: jax.Array) -> None:
        """A consumer warpgroup has read the values of this slot."""
        self._arrive(self.stages + slot)

    def await_key(self, slot: jax.Array) -> None:
        """The producer warp waits until every consumer has freed the slot's keys."""
        self._wait(slot)

    def await_value(self, slot: jax.Array) -> None:
        """The producer warp waits until every consumer has freed the slot's values."""
        self._wait(self.stages + slot)
