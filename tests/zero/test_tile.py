"""Where tiles end: whole pages, and no chunk left so small that it would be kept otherwise."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tritonspeed.kernels.dynamic_code import MIN_ELEMS
from tritonspeed.offload.options import MIN_TILE_ELEMS
from tritonspeed.zero.homes import PAGE_ELEMS
from tritonspeed.zero.tile import tile_ends

PAGES = st.integers(1, 40)


def crumbs(runs: list[tuple[int, int, int]], ends: list[int]) -> list[tuple[int, int]]:
    """Pieces below the bound of 8-bit moments, of runs that are not."""
    found = []
    for _, start, end in runs:
        cuts = [start, *(e for e in ends if start < e < end), end]
        pieces = list(pairwise(cuts))
        found += [p for p in pieces if end - start >= MIN_ELEMS and p[1] - p[0] < MIN_ELEMS]
    return found


@given(PAGES, st.integers(0, 10), st.integers(4, 9), st.floats(0, 1))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_tiles_cover_a_slice_in_whole_pages(num_pages, first, tile_pages, split):
    lo = first * PAGE_ELEMS // 2
    hi = lo + num_pages * PAGE_ELEMS // 2
    middle = lo + int(split * (hi - lo)) // 128 * 128
    runs = [(0, lo, middle), (1, middle, hi)] if lo < middle < hi else [(0, lo, hi)]
    ends = tile_ends(runs, lo, hi, tile_pages * PAGE_ELEMS)
    assert ends[0] == lo and ends[-1] == hi and ends == sorted(set(ends))
    assert all((end - lo) % PAGE_ELEMS == 0 for end in ends[:-1])
    assert all(b - a <= tile_pages * PAGE_ELEMS for a, b in pairwise(ends))
    assert not crumbs(runs, ends)  # two groups, as weight decay makes them: there is always such a cut


def test_a_cut_moves_where_it_would_leave_crumbs():
    runs = [(0, 0, MIN_TILE_ELEMS - 100), (1, MIN_TILE_ELEMS - 100, 10 * MIN_TILE_ELEMS)]
    ends = tile_ends(runs, 0, 10 * MIN_TILE_ELEMS, MIN_TILE_ELEMS)
    assert ends[1] < MIN_TILE_ELEMS and not crumbs(runs, ends)
