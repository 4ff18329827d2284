"""The check of a candidate's numbers, the clock, and who else is on the GPU."""

import math

import pytest
import torch

from tritonspeed.tuning import gpu, timing, verify
from tritonspeed.tuning.gpu import other_processes
from tritonspeed.tuning.verify import disagreement, distances, gross_error

CPU = torch.device("cpu")


def judged(candidate: torch.Tensor, heuristic: torch.Tensor, reference: torch.Tensor, num_summed: int = 1) -> str:
    known = distances([heuristic], [reference])
    return disagreement([candidate], distances([candidate], [reference]), known, num_summed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_rounding_passes_and_one_wrong_element_does_not(dtype: torch.dtype) -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    heuristic, nudged = exact.to(dtype), (exact * (1 + torch.finfo(dtype).eps / 2)).to(dtype)
    assert judged(nudged, heuristic, exact) == ""
    wrong = heuristic.clone()
    wrong[-1] += 0.2
    assert judged(wrong, heuristic, exact).startswith("output 0 is off by 0.2")


def test_many_small_errors_show_in_the_norm() -> None:
    exact = torch.ones(1000, dtype=torch.float64)
    exact[0] = 1000.0
    heuristic = exact.to(torch.bfloat16)
    candidate = heuristic.clone()
    candidate[1:] += 5.0  # below the largest allowed difference, which follows the largest element
    assert "in norm" in judged(candidate, heuristic, exact)


def test_nans_at_other_places_are_wrong() -> None:
    exact = torch.randn(10)
    bad = exact.clone()
    bad[3] = math.nan
    assert "not finite at other places" in judged(bad, exact, exact)
    assert judged(bad, bad, bad) == ""
    everywhere = torch.full((10,), math.nan)
    assert judged(everywhere, exact, exact)


def test_long_sums_in_fp32_may_be_off_by_more() -> None:
    exact = torch.randn(100, dtype=torch.float64)
    heuristic = exact.float()
    candidate = heuristic * (1 + 1e-5)
    assert judged(candidate, heuristic, exact) != ""
    assert judged(candidate, heuristic, exact, num_summed=10**6) == ""


def test_codes_may_differ_as_often_as_the_heuristics() -> None:
    reference = torch.arange(100, dtype=torch.int8)
    heuristic = reference.clone()
    heuristic[:2] += 1
    for num_wrong, passes in ((0, True), (4, True), (5, False)):
        candidate = reference.clone()
        candidate[:num_wrong] -= 1
        assert (judged(candidate, heuristic, reference) == "") is passes
    assert gross_error([heuristic], distances([heuristic], [reference])) == ""
    assert "differs from the reference in 50.0%" in gross_error(
        [reference], distances([torch.where(reference < 50, reference, 0)], [reference])
    )


def test_another_shape_is_no_answer() -> None:
    x = torch.ones(4)
    assert "shapes [(4,)], the reference's [(5,)]" in str(distances([x], [torch.ones(5)]))
    assert gross_error([x], distances([x], [torch.ones(5)])) == disagreement(
        [x], distances([x], [torch.ones(5)]), [], 1
    )


def test_a_kernel_that_is_wrong_as_it_stands_is_no_yardstick() -> None:
    x = torch.randn(100)
    assert gross_error([x * 1.2], distances([x * 1.2], [x]))
    assert gross_error([x * 1.001], distances([x * 1.001], [x])) == ""
    assert gross_error([torch.zeros(3)], distances([torch.zeros(3)], [torch.zeros(3)])) == ""


def test_large_outputs_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "CHUNK_ELEMS", 7)
    x, y = torch.randn(5, 10), torch.randn(5, 10)
    found = verify.distance(x, y)
    assert found.norm == pytest.approx((x.double() - y.double()).norm().item())
    assert found.largest == pytest.approx((x - y).abs().max().item())
    assert found.reference_norm == pytest.approx(y.double().norm().item())


@pytest.mark.parametrize(
    ("rows", "has_context", "others"),
    [
        (None, False, []),
        ([], False, []),
        ([["GPU-a", "77"]], True, []),
        ([["GPU-a", "77"], ["GPU-a", "78"]], True, ["78"]),
        ([["GPU-b", "78"]], False, []),  # on another GPU
        ([["GPU-a", "4711"]], False, ["4711"]),
        ([["GPU-a", "4711"]], True, []),  # in a container our own number is the host's
        ([["GPU-a", "4711"], ["GPU-a", "4712"]], True, ["4712"]),
    ],
)
def test_who_else_is_on_the_gpu(rows: list[list[str]] | None, has_context: bool, others: list[str]) -> None:
    assert other_processes("a", 77, has_context, rows) == others
    assert other_processes("GPU-a", 77, has_context, rows) == others


def test_a_gpu_that_is_busy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "a"

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *query: [["GPU-a", "12"], ["GPU-a", "13"]])
    with pytest.raises(ValueError, match=r"cuda:0 is used by 2 other processes \(pid 12, 13\).*CUDA_VISIBLE_DEVICES"):
        gpu.check_alone(torch.device("cuda:0"))
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *query: None)
    gpu.check_alone(torch.device("cuda:0"))


def test_what_nvidia_smi_says_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU-a, 12'\necho\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpu.nvidia_smi("--query-compute-apps=gpu_uuid,pid") == [["GPU-a", "12"]]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.nvidia_smi("--query-gpu=driver_version") is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert gpu.nvidia_smi("--query-gpu=driver_version") is None


def test_a_measurement_says_where_and_when() -> None:
    found = gpu.header(CPU)
    assert found["date"].endswith("+00:00") and found["device"] and found["torch"] == torch.__version__


def test_variants_are_timed_in_turns_on_buffers_in_rotation() -> None:
    calls: list[tuple[str, int]] = []
    variants = {name: lambda buffers, name=name: calls.append((name, buffers)) for name in "abc"}
    times = timing.interleaved_ms(variants, [0, 1], CPU, rounds=4)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 4 + timing.NUM_WARM_UP_ROUNDS
    assert all(sorted(name for name, _ in each) == ["a", "b", "c"] for each in rounds)
    assert {each[0][0] for each in rounds} == {"a", "b", "c"}, "each round starts with another one"
    assert [buffers for _, buffers in calls] == [i % 2 for i in range(len(calls))]


def test_rotation_is_for_caches_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert timing.num_rotations(10, CPU) == 1
    assert timing.num_rotations(10, torch.device("cuda")) == 16
    assert timing.num_rotations(1000, torch.device("cuda")) == 2
    timing.warm_up(CPU)


@pytest.mark.gpu
def test_a_real_search_on_a_gpu(tmp_path) -> None:
    from tritonspeed import tuning
    from tritonspeed.tuning.shapes import MODELS

    cases = [c for some in tuning.all_cases([MODELS["gpt2"]], torch.bfloat16, ["adamw"]).values() for c in some]
    outcomes = tuning.tune(cases, tmp_path, search=tuning.Search(rounds=(3,), final_rounds=10))
    assert [outcome.verdict for outcome in outcomes] in (["tuned"], ["heuristic"]), outcomes
    assert tuning.tune(cases, tmp_path)[0].verdict == "known"
