"""How positions are dealt: the closed forms against dealing them out one by one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.kernels.blocks import EVERYTHING, Blocks

SIZES, COUNTS = st.integers(1, 9), st.integers(1, 5)


def deal(blocks: Blocks, positions: int) -> list[list[int]]:
    """What every device holds, slot by slot."""
    hands: list[list[int]] = [[] for _ in range(blocks.count)]
    turn = 0
    for position in range(positions):
        hands[turn].append(position)
        if len(hands[turn]) % blocks.size == 0:
            turn = (turn + 1) % blocks.count
    return hands


@settings(deadline=None, max_examples=30)
@given(size=SIZES, count=COUNTS, positions=st.integers(0, 150))
def test_the_closed_forms_deal_the_positions(size: int, count: int, positions: int) -> None:
    blocks = Blocks(size, count)
    for rank, hand in enumerate(deal(blocks, positions)):
        slots = np.arange(len(hand))
        np.testing.assert_array_equal(blocks.position(slots, rank), hand)
        np.testing.assert_array_equal(blocks.owner(np.array(hand, int)), rank)
        np.testing.assert_array_equal(blocks.slot(np.array(hand, int)), slots)
        assert int(blocks.below(positions, rank)) == len(hand)


@settings(deadline=None, max_examples=10)
@given(size=SIZES, count=COUNTS, rounds=st.integers(0, 4))
def test_rows_are_put_in_the_order_of_their_owners(size: int, count: int, rounds: int) -> None:
    blocks = Blocks(size, count)
    rows = rounds * blocks.round
    x = jnp.arange(2 * rows).reshape(2, rows)
    dealt = blocks.deal(x, 1)
    np.testing.assert_array_equal(dealt[0], np.concatenate([np.array(h, int) for h in deal(blocks, rows)]))
    np.testing.assert_array_equal(blocks.undeal(dealt, 1), x)
    np.testing.assert_array_equal(dealt[:, blocks.dealt(np.arange(rows), rows)], x)


@pytest.mark.parametrize(
    ("count", "chunk_len", "size"),
    [(2, 253_952, 512), (8, 253_952, 128), (16, 253_952, 64), (3, None, 256), (4, 32, 8), (2, 6, 1), (2, 2048, 512)],
)  # fmt: skip
def test_a_round_divides_the_chunk_length(count: int, chunk_len: int | None, size: int) -> None:
    assert Blocks.fitting(count, chunk_len) == Blocks(size, count)


def test_devices_that_do_not_divide_the_chunk_length_are_refused() -> None:
    with pytest.raises(ValueError, match="3 devices do not divide 253952 positions"):
        Blocks.fitting(3, 253_952)


def test_alone_slot_and_position_are_the_same() -> None:
    positions = np.arange(300)
    np.testing.assert_array_equal(EVERYTHING.position(positions), positions)
    np.testing.assert_array_equal(EVERYTHING.below(positions), positions)
