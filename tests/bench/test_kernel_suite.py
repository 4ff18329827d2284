"""The kernel suite: what it counts, what it lists first, and that a run leaves a page. On a CPU, with made-up times."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import suite as suite_module
from bench.results_page import load, newest, save, write_report
from bench.suite import Absent, Ceilings, Row, Suite, in_turns, lost
from tritonspeed.tuning.case import Case, Inputs

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def case(n: int = 4, name: str = "double", raises: bool = False) -> Case:
    def run(inputs: Inputs) -> torch.Tensor:
        if raises:
            raise RuntimeError("no such\nkernel")
        return inputs["x"].mul_(2)  # in place: each variant must be judged on inputs of its own

    return Case(
        name, "forward", {"n": n}, torch.float32, num_bytes=8 * n, num_flops=n,
        make=lambda device, seed: {"x": torch.arange(1, n + 1, dtype=torch.float32, device=device)},
        run=run, reference=lambda inputs: inputs["x"] * 2,
    )  # fmt: skip


def suite() -> Suite:
    return Suite(CPU, Ceilings(gb_per_s=10.0, tflop_per_s=0.1), [], [])


def row(variant: str, median_us: float, shape: str = "n=4") -> Row:
    times = {"median_us": median_us, "p20_us": median_us, "p80_us": median_us, "with_python_us": median_us}
    speeds = {"gb_per_s": 1.0, "tflop_per_s": 0.5, "percent_of_peak": None, "percent_of_ceiling": 50.0, "error": 1e-7}
    sizes = {"num_bytes": 1024, "num_flops": 64}
    return Row("norm", "forward", "m", shape, "float32", variant, variant == "ours", **sizes, **times, **speeds)


def test_the_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    ceilings = Ceilings(gb_per_s=100.0, tflop_per_s=1.0)
    assert ceilings.ridge == 10.0
    assert ceilings.bound_us(num_bytes=100_000, num_flops=1) == 1.0
    assert ceilings.bound_us(num_bytes=1, num_flops=3_000_000) == 3.0


def test_a_case_is_measured_against_its_roof_and_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        suite_module, "interleaved_ms", lambda calls, sets, device, rounds: dict.fromkeys(calls, [2e-3] * 5)
    )
    rows = suite().measure("m", case(n=1000), rounds=5)
    assert [r.variant for r in rows] == ["ours", "torch eager"]
    assert all(r.error == 0 for r in rows)
    assert rows[0].median_us == 2.0 and rows[0].gb_per_s == pytest.approx(4.0)
    assert rows[0].percent_of_ceiling == pytest.approx(40.0) and rows[0].percent_of_peak is None


def test_what_cannot_run_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, device: torch.device) -> dict:
        def prepare(inputs: Inputs) -> None:
            raise ModuleNotFoundError("No module named 'peer'")

        return {"peer": prepare}

    monkeypatch.setattr(suite_module, "variants_of", broken)
    here = suite()
    assert [r.variant for r in here.measure("m", case(), rounds=2)] == ["ours"]
    assert here.absent == [Absent(case().label, "peer", "ModuleNotFoundError: No module named 'peer'")]
    assert here.measure("m", case(raises=True), rounds=2) == []
    assert here.absent[1] == Absent(case().label, "ours", "RuntimeError: no such")
    num_absent = len(here.absent)
    here.skipped = ("pee",)
    here.measure("m", case(), rounds=2)
    assert len(here.absent) == num_absent


def test_a_wrong_kernel_shows_in_its_error() -> None:
    wrong = Case(**{**vars(case()), "run": lambda inputs: inputs["x"] * 3})
    errors = {r.variant: r.error for r in suite().measure("m", wrong, rounds=2)}
    assert errors == {"ours": pytest.approx(0.5), "torch eager": 0.0}


def test_the_time_limit_stops_between_cases_and_says_what_is_left() -> None:
    here, cases = suite(), [("m", case(n)) for n in (1, 2, 3)] + [("m", case(10**6))]
    assert list(here.run(cases, rounds=2, until=time.monotonic() - 1, max_bytes=1000)) == []
    assert (here.num_left, here.rows) == (3, [])
    assert len(list(here.run(cases, rounds=2, until=time.monotonic() + 60, max_bytes=1000))) == 3


def test_the_largest_of_each_family_come_first() -> None:
    first, second = [case(1, "a"), case(3, "a"), case(2, "a")], [case(9, "b")]
    assert [(c.name, c.shape["n"]) for c in in_turns([first, second])] == [("a", 3), ("b", 9), ("a", 2), ("a", 1)]


def test_losses_are_found_and_the_worst_is_first() -> None:
    rows = [row("ours", 2.0), row("x", 1.0), row("ours", 3.0, "n=5"), row("x", 1.0, "n=5"), row("y", 2.0, "n=5")]
    rows += [row("ours", 1.0, "n=6"), row("x", 1.5, "n=6")]
    assert [(ours.shape, best.variant) for ours, best in lost(rows)] == [("n=5", "x"), ("n=4", "x")]


def test_a_result_is_kept_read_again_and_drawn(tmp_path: Path) -> None:
    here = suite()
    here.rows += [row("ours", 2.0), row("x", 1.0), row("ours", 1.0, "n=8"), row("x", 3.0, "n=8")]
    here.absent.append(Absent("norm forward n=4 fp32", "Liger", "ModuleNotFoundError: liger"))
    path = tmp_path / "2026-01-01_cpu_kernels-float32.json"
    save(path, here, {"device": "a CPU", "torch": "2", "triton": "3", "commit": "c", "date": "d"})
    _, ceilings, rows, absent = load(path)
    assert (ceilings, rows, absent) == (here.ceilings, here.rows, here.absent)
    page = write_report(newest(tmp_path), Console(quiet=True)).read_text()
    assert page.index("Where a peer wins: 1 of 2 cases") < page.index("## norm") < page.index("What could not run")
    assert "| norm | forward | n=4 | float32 | 2.0 | x | 1.0 | 2.00 |" in page
    for picture in ("lines", "roofline"):
        assert (tmp_path / f"{path.stem}_{picture}.png").stat().st_size > 5000


def test_the_command_measures_every_family_and_leaves_its_page(tmp_path: Path) -> None:
    options = ["--models", "tiny", "--dtype", "float32", "--rounds", "2", "--out", str(tmp_path), "--skip", "Liger"]
    command = [sys.executable, "-m", "bench", "run", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {"adamw_", "layer_norm", "softmax", "cross_entropy", "swiglu", "rotary", "quantize", "newton_schulz"} <= {
        row["op"] for row in record["rows"]
    }
    assert [each for each in record["absent"] if each["variant"] in ("ours", "torch eager")] == []
    worst = max(
        (row for row in record["rows"] if row["is_ours"] and row["error"] is not None), key=lambda r: r["error"]
    )
    assert worst["error"] < 1e-2, worst  # fp32; codes of a quantisation differ in a tie or two
