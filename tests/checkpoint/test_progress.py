"""The bar is drawn where somebody looks, and nowhere else."""

from __future__ import annotations

import io

import pytest

from tritonspeed.checkpoint.progress import LEAST_BYTES, progress


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def draw(monkeypatch, *, is_terminal: bool = True, total_bytes: int = 4 * LEAST_BYTES, rank: int = 0) -> str:
    screen = Screen(is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress("loading global_step7 [b]", total_bytes, rank) as read:
        for _ in range(4):
            read(total_bytes // 4)
    return screen.getvalue()


def test_a_bar_on_a_terminal(monkeypatch):
    shown = draw(monkeypatch)
    assert "loading global_step7 [b]" in shown and "1.0/1.0 GiB" in shown


@pytest.mark.parametrize("given", [{"is_terminal": False}, {"total_bytes": LEAST_BYTES - 4}, {"rank": 1}])
def test_no_bar_where_nobody_looks(monkeypatch, given):
    assert draw(monkeypatch, **given) == ""


def test_an_error_ends_the_bar(monkeypatch):
    screen = Screen(True)
    monkeypatch.setattr("sys.stderr", screen)
    with pytest.raises(KeyError), progress("loading", 4 * LEAST_BYTES) as read:
        read(1)
        raise KeyError("x")
    assert screen.getvalue().endswith("\x1b[2K")  # the line is given back
