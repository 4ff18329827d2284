"""The files that DeepSpeed's monitors write: the same names, columns, tags, steps and values."""

from __future__ import annotations

from script_cases import MONITORED


def test_monitors_write_what_deepspeeds_write(as_recorded):
    record = as_recorded(MONITORED[0])
    assert len(record["metrics"]["csv"]) == 8 and len(record["metrics"]["tags"]) == 8
