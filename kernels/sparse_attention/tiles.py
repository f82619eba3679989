"""Which key tiles of sparse attention a device holds, where positions are dealt to several.

Blocks are whole tiles of BAND positions, so a tile of slots is a tile of positions, and which of the key tiles before query
tile c are here depends on c modulo the tiles of a round alone: a list of tile distances for each residue serves all queries.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.sparse_attention.bands import BAND


def residues(blocks: Blocks | None) -> int:
    """R: tiles of a round; 1 for a device that holds all."""
    return blocks.round // BAND if blocks else 1


def entries(blocks: Blocks | None, distances: int) -> int:
    """K, how many of the tile distances 0 .. distances - 1 a residue's list may hold: 0, and those of key tiles here."""
    if blocks is None:
        return distances
    rounds, rest = divmod(distances - 1, residues(blocks))
    each = blocks.size // BAND
    return 1 + rounds * each + min(rest, each)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of a share, or with None of a device that holds all; tiles of positions and of slots are counted from 0."""

    share: Share | None

    def holds(self, tile: Any) -> Any:
        """Whether a tile of positions is here."""
        return self.share is None or self.share.blocks.owner(tile * BAND) == self.share.rank

    def below(self, tile: Any) -> Any:
        """How many tiles of slots hold positions below this tile of positions."""
        return tile if self.share is None else self.share.below(tile * BAND) // BAND

    def position(self, tile: Any) -> Any:
        """The tile of positions in a tile of slots."""
        return tile if self.share is None else self.share.position(tile * BAND) // BAND

    def distances(self, count: int) -> jax.Array | None:
        """int32[R, K]: for query tiles c with c mod R = r, 0, then ascending the distances of the key tiles before that are
        here; some of the last ones may not be below `count`. None stands for 0 .. count - 1."""
        if self.share is None:
            return None
        blocks = self.share.blocks
        c_R1 = jnp.arange(residues(blocks), dtype=jnp.int32)[:, None]
        back_K = jnp.arange(entries(blocks, count), dtype=jnp.int32)
        # Floor division takes slots before the first to the rounds before the first.
        apart_RK = c_R1 - self.position(self.below(c_R1) - back_K)
        return jnp.where(back_K == 0, 0, apart_RK)
