"""`tritonspeed report`: its facts, on this machine and on made-up ones, and its two forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tritonspeed import cli
from tritonspeed.cli import kernel_check, machine, report
from tritonspeed.tuning import Case

GIB = 2**30


def made_up(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {32 * 2**20} kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (64, 32)),
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/memory.max": str(16 * GIB),
                "sys/fs/cgroup/pod/memory.current": str(6 * GIB),
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
                "sys/fs/cgroup/pod/box/memory.current": str(GIB),
            },
            (16, 10),
        ),
        (  # inside a container: the path is the host's, the tree begins at the container
            {
                "proc/self/cgroup": "0::/system.slice/docker-1\n",
                "sys/fs/cgroup/memory.max": str(8 * GIB),
                "sys/fs/cgroup/memory.current": str(9 * GIB),
            },
            (8, 0),
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(4 * GIB),
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
            },
            (4, 3),
        ),
    ],
)
def test_host_memory_is_what_the_cgroup_leaves(tmp_path: Path, files: dict[str, str], expected: tuple) -> None:
    root = made_up(tmp_path, {"proc/meminfo": MEMINFO, **files})
    total, available = machine.host_memory(root)
    assert (total / GIB, available / GIB) == expected


def test_host_memory_here() -> None:
    total, available = machine.host_memory()
    assert 0 < available <= total


def test_processor_and_driver_of_made_up_machines(tmp_path: Path) -> None:
    assert (machine.cpu_flags(tmp_path), machine.cpu_name(tmp_path)) == (set(), "")
    assert machine.driver_version(tmp_path) is None
    made_up(tmp_path, {"proc/cpuinfo": "model name\t: A Chip\nflags\t\t: fpu amx_bf16\n\nflags: other\n"})
    assert (machine.cpu_flags(tmp_path), machine.cpu_name(tmp_path)) == ({"fpu", "amx_bf16"}, "A Chip")
    made_up(tmp_path, {"sys/module/amdgpu/version": "6.10.5\n"})
    assert machine.driver_version(tmp_path) == "amdgpu 6.10.5"
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC version: 12.3.0"
    made_up(tmp_path, {"proc/driver/nvidia/version": text})
    assert machine.driver_version(tmp_path) == "NVIDIA 570.124.06"


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.c_compiler({}) is None
    for name in ("clang", "mycc", "gcc", "g++"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert machine.c_compiler({}) == str(tmp_path / "gcc")
    assert machine.c_compiler({"CC": "mycc -m64"}) == str(tmp_path / "mycc")
    assert machine.cxx_compiler({}) == str(tmp_path / "g++")
    assert machine.c_compiler({"CC": "absent"}) is None


def test_versions_of_what_is_and_is_not_installed() -> None:
    assert machine.package_versions(["numpy", "no-such-package"]) == {
        "numpy": __import__("numpy").__version__,
        "no-such-package": None,
    }


def test_every_row_that_is_not_ok_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "shared_memory", lambda: (64 * 2**20, 0))
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    rows = report.gather(with_kernels=False).rows
    assert {row.what: row.status for row in rows if row.status == "ok"}.keys() <= {"bf16 arithmetic"}
    for row in rows:
        assert row.status in ("ok", "limited", "missing")
        assert (row.remedy == "") == (row.status == "ok"), row


def test_works_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    rows = {row.what: row for row in report.gather(with_kernels=False).rows}
    assert rows["several ranks on one machine (gloo)"].status == "missing"


def test_json_and_table_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--json", "--no-kernels"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["memory"]["host"] == machine.host_memory()[0]
    assert cli.main(["report", "--no-kernels"]) == 0
    table = capsys.readouterr().out
    for row in facts["rows"]:
        assert row["what"] in table
        assert row["status"] in table
    assert torch.__version__ in table


def test_a_failing_kernel_is_a_row_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(inputs: dict) -> torch.Tensor:
        raise RuntimeError("[no] compiler\nmore")

    failed = kernel_check.check_case(a_case(run), torch.device("cpu"))
    assert (failed.passed, failed.error) == (False, "RuntimeError: [no] compiler")
    facts = report.gather(with_kernels=False)
    monkeypatch.setattr(report, "gather", lambda with_kernels: report.Report(**{**vars(facts), "kernels": [failed]}))
    assert cli.main(["report"]) == 1
    assert "RuntimeError: [no] compiler" in capsys.readouterr().out


def a_case(run: Callable[[dict], torch.Tensor]) -> Case:
    reference = torch.tensor([1.0, -2.0])
    return Case("k", "forward", {"n": 2}, torch.float32, 8, 2, lambda device, seed: {}, run, lambda inputs: reference)


def test_a_wrong_kernel_does_not_pass() -> None:
    results = [[1.0, -2.0], [1.0, float("nan")], [1.0, -2.001], [1.0, -2.0, 0.0]]
    passed = [
        kernel_check.check_case(a_case(lambda _, r=r: torch.tensor(r)), torch.device("cpu")).passed for r in results
    ]
    assert passed == [True, False, False, False]


def test_kernels_agree_with_themselves_on_the_cpu() -> None:
    runs = kernel_check.run_kernels("cpu")
    assert {run.name.split()[0] for run in runs} >= {"adamw_", "sum_of_squares", "quantize"}
    assert [run for run in runs if not run.passed] == []


@pytest.mark.gpu
def test_kernels_agree_with_their_references_on_the_gpu() -> None:
    for run in kernel_check.run_kernels("cuda"):
        assert run.passed, run
