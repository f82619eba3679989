"""What the Hopper kernels share: what the chip is, and rings of shared memory."""

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
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from qwen_jax.kernels.blocks import Blocks, Share

LOG2E = math.log2(math.e)
# Of keys beside values of bfloat16; queries take the same.
KEY_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
SHARED_BYTES = 227 * 1024  # shared memory a block may take


def tiled(itemsize: int, columns: int) -> Any:
    """Transforms of a shared-memory tile as wgmma and TMA want it: swizzled blocks of 8 rows by at most 128 bytes."""
    width = min(128, itemsize * columns)
    # mypy takes jax's empty protocol methods for abstract ones.
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)  # type: ignore[abstract]


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


def keep_pace(counters: Any, n: jax.Array, amount: int, target: jax.Array | int) -> None:
    """A warp adds `amount` to semaphore n of `counters` and waits until it is `target` at least, or for some 100 us.

    The wait has an end because it only serves speed: were some block never to come, the others would go on.
    """
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar))
    def step(_: Any, counters_ref: Any, n: Any, target: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(counters_ref), [n.registers.item()], i32)
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, target.registers.item()],
            f"""{{
            .reg .pred p; .reg .b32 value, tries;
            elect.sync _|p, 0xffffffff;
            @p red.relaxed.gpu.global.add.u32 [$0], {amount};
            mov.b32 tries, 0;
            poll:
            .pragma "nounroll";
            ld.relaxed.gpu.global.b32 value, [$0];
            setp.ge.s32 p, value, $1;
            @p bra done;
            nanosleep.u32 500;
            add.s32 tries, tries, 1;
            setp.lt.s32 p, tries, 200;
            @p bra poll;
            done:
            }}""",
            "l,r",
            has_side_effects=True,
        )

    step(counters, n, jnp.int32(target))


@dataclasses.dataclass(frozen=True)
class Held:
    """What positions the key tiles of a cache hold, inside a kernel; `blocks` and `rank` as in `blocks.Share`, or None and 0.

    A tile lies in one block: `keys` of them, consecutive positions.
    """

    blocks: Blocks | None
    rank: jax.Array
    keys: int

    def start(self, tile: jax.Array) -> jax.Array:
        """The position of a tile's first key."""
        if self.blocks is None:
            return tile * self.keys
        each = self.blocks.size // self.keys
        own = self.rank * self.blocks.size + lax.rem(tile, each) * self.keys
        return lax.div(tile, each) * self.blocks.round + own

    def below(self, position: jax.Array) -> jax.Array:
        """How many slots hold positions below this one."""
        if self.blocks is None:
            return position
        rest = lax.rem(position, self.blocks.round) - self.rank * self.blocks.size
        own = jnp.minimum(jnp.maximum(rest, 0), self.blocks.size)
        return lax.div(position, self.blocks.round) * self.blocks.size + own


def why_not_shared(share: Share | None, keys: int) -> str | None:
    """Why tiles of `keys` keys cannot be read from a cache that is dealt out, or None."""
    if share is None or share.blocks.size % keys == 0:
        return None
    return (
        f"needs a cache dealt out in blocks of whole key tiles of {keys}, got blocks of {share.blocks.size}"
    )


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory through which one producer warp hands tiles to consumer warpgroups, in order.

    Tiles are counted from 0 over a block's whole life; tile n lies in slot n mod stages.

    Attributes:
        tiles: shared memory [stages, ...].
        full: a plgpu.Barrier of `stages`: the copy into a slot has arrived.
        free: one with an arrival a consumer warpgroup: all have read the slot; a plgpu.ClusterBarrier if blocks share copies.
        cluster: name of the axis of blocks that share every copy, or None.
    """

    tiles: Any
    full: Any
    free: Any
    cluster: str | None = None

    @property
    def stages(self) -> int:
        return self.tiles.shape[0]

    def slot(self, n: jax.Array) -> jax.Array:
        """Slot of tile n."""
        return lax.rem(n, jnp.int32(self.stages))

    def load(self, source: Any, n: jax.Array) -> None:
        """The producer warp copies tile n from `source`, once its slot is free."""
        slot = self.slot(n)
        self.claim(n)
        plgpu.copy_gmem_to_smem(source, self.tiles.at[slot], self.full.at[slot], collective_axes=self.cluster)

    def claim(self, n: jax.Array) -> None:
        """A producer waits until the slot of tile n is free."""
        pl.when(n >= self.stages)(functools.partial(plgpu.barrier_wait, self.free.at[self.slot(n)]))

    def drain(self, n: jax.Array) -> None:
        """The producer warp waits until all n tiles have been read, so that no other block signals one that has ended."""
        for back in range(self.stages):
            pl.when(n > back)(functools.partial(plgpu.barrier_wait, self.free.at[self.slot(n - 1 - back)]))

    def wait(self, slot: jax.Array) -> None:
        """A consumer warpgroup waits for a slot's tile."""
        plgpu.barrier_wait(self.full.at[slot])

    def release(self, slot: jax.Array) -> None:
        """A consumer warpgroup has read a slot's tile."""
        plgpu.barrier_arrive(self.free.at[slot])
