"""Which bytes were written, against a list with an entry for every byte."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tritonspeed.offload.runs import Run, Runs

END = 30
INTERVALS = st.tuples(st.integers(0, END), st.integers(0, END)).map(sorted)


@given(st.lists(INTERVALS, max_size=12), INTERVALS)
def test_runs_are_what_was_written_last(writes, asked):
    runs, bytes_written = Runs(), [None] * END
    for number, (lo, hi) in enumerate(writes):
        runs.add(Run(lo, hi, str(number)))
        bytes_written[lo:hi] = [number] * (hi - lo)

    here = list(runs)
    assert all(run.lo < run.hi for run in here)
    assert all(a.hi <= b.lo for a, b in pairwise(here))
    covered = [any(run.lo <= i < run.hi for run in here) for i in range(END)]
    assert covered == [number is not None for number in bytes_written]
    for run in here:  # a digest is of exactly what was written together
        if run.digest is not None:
            number = int(run.digest)
            assert [run.lo, run.hi] == writes[number] and set(bytes_written[run.lo : run.hi]) == {number}

    lo, hi = asked
    assert runs.overlapping(lo, hi) == [run for run in here if max(lo, run.lo) < min(hi, run.hi)]
    in_gaps = [i for start, end in runs.gaps(lo, hi) for i in range(start, end)]
    assert in_gaps == [i for i in range(lo, hi) if bytes_written[i] is None]
    assert all(start < end for start, end in runs.gaps(lo, hi))
