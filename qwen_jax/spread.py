"""How one model lies on a mesh of several devices.

Linear layers are left to the compiler, which follows the weights' shardings. Attention runs inside `jax.shard_map`
(`attention.py`): every backend sees the rows, heads and positions of one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from qwen_jax.config import ModelConfig
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.merge import merge
from qwen_jax.sharding import CONTEXT, DATA, ShardingRules, blocks_on


@dataclasses.dataclass(frozen=True)
class Spread:
    """Several devices that run one model; static in a jitted function.

    Attributes:
        mesh: with the axes data, context and tensor.
        blocks: how positions are dealt over the axis context; None if that has one device.
        rules: which dimension is split over which axis.
    """

    mesh: Mesh
    blocks: Blocks | None
    rules: ShardingRules

    @classmethod
    def of(cls, config: ModelConfig, mesh: Mesh) -> Spread | None:
        """That of a model on a mesh as `sharding.full_mesh` returns it; None for one device."""
        return None if mesh.size == 1 else cls(mesh, blocks_on(config, mesh), ShardingRules())

    @property
    def round(self) -> int:
        """Positions that pieces begin at a multiple of, and that a cache holds a multiple of."""
        return self.blocks.round if self.blocks else 1

    @property
    def rows(self) -> int:
        """What the rows of a cache are a multiple of."""
        return self.mesh.shape[DATA]

    def whole_rows(self, batch: int) -> Spread:
        """For rows with no cache: positions are not split, and the rows only if they divide."""
        divided = batch % self.rows == 0
        rules = dataclasses.replace(self.rules, T=None, B=self.rules.B if divided else None)
        return Spread(self.mesh, None, rules)

    def place(self, x: jax.Array, letters: str) -> jax.Array:
        """Constrains an array inside a jitted function by its first dimensions; every device holds all of the others."""
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.rules.spec(letters)))

    def run(self, body: Callable[..., Any], letters: tuple[str, ...], out: Any, *arguments: Any) -> Any:
        """`body` of what each device holds of the arguments, with its share of the positions as the last one.

        Args:
            letters: the first dimensions of each argument, or of every leaf of one that is a pytree.
            out: the same of the result.
        """
        spec = self.rules.spec

        def on_one_device(*mine: Any) -> Any:
            return body(*mine, Share.here(self.blocks, CONTEXT) if self.blocks else None)

        return jax.shard_map(
            on_one_device,
            mesh=self.mesh,
            in_specs=tuple(map(spec, letters)),
            out_specs=jax.tree.map(spec, out),
            check_vma=False,  # backends that are Pallas kernels say nothing of what varies
        )(*arguments)


def gather_queries(q_BTNH: jax.Array, share: Share | None) -> jax.Array:
    """The queries of a whole piece in the order of positions, from each device's own."""
    if share is None:
        return q_BTNH
    return share.blocks.undeal(lax.all_gather(q_BTNH, share.axis, axis=1, tiled=True), 1)


def scatter_outputs(out_BTNH: jax.Array, lse_BTN: jax.Array, share: Share | None) -> jax.Array:
    """Each device's own queries' attention, from what every device's keys gave all of them."""
    if share is None:
        return out_BTNH
    lse_PBTN = lax.all_gather(lse_BTN, share.axis)
    peak_BTN = lse_PBTN.max(0)
    base_BTN = jnp.where(jnp.isneginf(peak_BTN), 0.0, peak_BTN)
    total_BTN = jnp.exp(lse_PBTN - base_BTN).sum(0)
    weight_BTN = jnp.exp(lse_BTN - base_BTN) / jnp.where(total_BTN > 0, total_BTN, 1.0)
    weighted = share.blocks.deal(out_BTNH.astype(jnp.float32) * weight_BTN[..., None], 1)
    mine = lax.psum_scatter(weighted, share.axis, scatter_dimension=1, tiled=True)
    return mine.astype(out_BTNH.dtype)


def merge_outputs(out_BNH: jax.Array, lse_BN: jax.Array, share: Share | None) -> jax.Array:
    """The attention of queries that every device has, from what each device's keys gave them."""
    if share is None:
        return out_BNH
    parts = jnp.concatenate([out_BNH.astype(jnp.float32), lse_BN[..., None]], axis=-1)  # one small message
    parts = lax.all_gather(parts, share.axis)
    return merge(parts[..., :-1], parts[..., -1], axis=0)[0].astype(out_BNH.dtype)
