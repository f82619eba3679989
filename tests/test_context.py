"""How much cache is allocated."""

from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.context import CAPACITY_STEP, capacity_for


@given(max_len=st.integers(1, 1_100_000), data=st.data())
def test_a_cache_holds_what_is_asked_and_little_more(max_len: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, max_len))
    capacity = capacity_for(tokens, max_len)
    assert tokens <= capacity < max(tokens * 1.25, tokens + CAPACITY_STEP)
    assert capacity < max_len + CAPACITY_STEP


def test_few_programs_are_compiled() -> None:
    assert len({capacity_for(n, 1 << 20) for n in range(1, 1 << 20, 97)}) < 60
    assert capacity_for(1_010_000, 1_010_000) == 1_010_176
    assert capacity_for(1_010_000, 1_010_000, chunk=31_744) == 32 * 31_744
    assert capacity_for(31_744, 1_010_000, chunk=31_744) == 32_768
