"""The compiled pass over a flat chunk: its bits, on any cut, thread and number of threads; what chooses it, what fails.

Each pair of types compiles for seconds, once for a machine (Inductor's cache); the pairs here are those that training
uses.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import tolerance
from torch import Tensor

from tritonspeed.kernels import adagrad_, adamw_, host_step, lion_
from tritonspeed.kernels._triton import INTERPRETED
from tritonspeed.kernels.adagrad import adagrad_reference
from tritonspeed.kernels.adamw import adamw_reference
from tritonspeed.kernels.lion import lion_reference

pytestmark = pytest.mark.skipif(INTERPRETED, reason="under the interpreter a CPU tensor takes the kernel")
ADAMW = {"step": 3, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
N = 5 * 1024 + 77


@dataclass(frozen=True)
class Rule:
    """One optimizer with one pair of types; ``changes`` are settings that take the same program."""

    run: Callable[..., None]
    reference: Callable[..., None]
    states: tuple[str, ...]
    hyper: dict[str, Any]
    grad_dtype: torch.dtype
    copy_dtype: torch.dtype | None
    changes: dict[str, Any] = field(default_factory=dict)


MOMENTS = ("exp_avg", "exp_avg_sq")
RULES = {
    "adamw, bf16": Rule(
        adamw_, adamw_reference, MOMENTS, ADAMW, torch.bfloat16, torch.bfloat16,
        {"bias_correction": False, "lr": 3e-2, "betas": (0.0, 0.99), "step": 10**6},
    ),
    "adamw, fp32": Rule(adamw_, adamw_reference, MOMENTS, ADAMW, torch.float32, None, {"weight_decay": 0.0}),
    "adam, fp16": Rule(
        adamw_, adamw_reference, MOMENTS, {**ADAMW, "decoupled": False}, torch.float16, torch.float16, {"step": 1}
    ),
    "lion, bf16": Rule(
        lion_, lion_reference, ("exp_avg",), {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
        torch.bfloat16, torch.bfloat16, {"lr": 0.1},
    ),
    "adagrad, fp32": Rule(
        adagrad_, adagrad_reference, ("sum_of_squares",),
        {"step": 3, "lr": 1e-2, "lr_decay": 0.1, "eps": 1e-10, "weight_decay": 0.1},
        torch.float32, torch.bfloat16, {"step": 9, "eps": 1e-3},
    ),
}  # fmt: skip
ruled = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    host_step.use_host_step("compiled")
    if host_step.host_step() != "compiled":
        pytest.skip("no C++ compiler here")
    yield
    host_step.use_host_step("auto")


def tensors(rule: Rule, n: int = N) -> dict[str, Tensor]:
    """A chunk in the middle of training, with the values that break carelessness."""
    generator = torch.Generator().manual_seed(n)
    made = {"master": torch.randn(n, generator=generator)}
    made |= {name: torch.rand(n, generator=generator) * 0.1 for name in rule.states}
    made["grad"] = torch.randn(n, generator=generator).to(rule.grad_dtype)
    if n > 100:
        made["grad"][3:9] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-7])
        made["master"][20:24] = torch.tensor([1e-40, -1e-45, 3e38, float("inf")])
        made[rule.states[0]][30:40] = 0.0
        made["grad"][30:36] = 0.0
    if rule.copy_dtype is not None:
        made["param_out"] = torch.full((n,), float("nan"), dtype=rule.copy_dtype)
    return made


def clones(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in given.items()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal, NaN with NaN."""
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, k=name: f"{k}: {m}"
        )


def assert_same_representation(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The very bits, signs of zero and of NaN too."""
    for name, tensor in ours.items():
        whole = torch.int32 if tensor.dtype == torch.float32 else torch.int16
        assert torch.equal(tensor.view(whole), theirs[name].view(whole)), name


@pytest.fixture
def correct_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32's own vectorised root is an ulp off for one in six; fp64's, rounded, is the correctly rounded one."""
    monkeypatch.setattr(Tensor, "sqrt", lambda x: x.double().pow(0.5).to(x.dtype))


@ruled
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_the_reference_to_the_last_bit(rule: Rule, scaled: bool, correct_root: None) -> None:
    for changes in ({}, rule.changes):
        ours = tensors(rule)
        plain = clones(ours)
        options = {**rule.hyper, **changes, "grad_scale": torch.tensor(0.37) if scaled else None}
        rule.run(**ours, **options)
        rule.reference(**plain, **options)
        assert_same_bits(ours, plain)
        assert ours["master"].isnan().sum() >= 1, "the NaN gradient reached its weight"
        assert ours["master"][10:20].isfinite().all()


@ruled
def test_is_the_chunked_form_to_an_ulp_or_two(rule: Rule) -> None:
    ours = {name: tensor[40:] for name, tensor in tensors(rule).items()}
    chunked = clones(ours)
    rule.run(**ours, **rule.hyper)
    host_step.use_host_step("chunked")
    rule.run(**chunked, **rule.hyper)
    for name in ours:
        if name != "param_out":
            torch.testing.assert_close(ours[name], chunked[name], **tolerance(torch.float32))


@ruled
@pytest.mark.parametrize("cuts", [(1024, 4096), (1, 2, 66, 1099, 5000)], ids=["at_1024", "odd"])
def test_cuts_and_threads_change_no_bit(rule: Rule, cuts: tuple[int, ...]) -> None:
    whole = tensors(rule)
    pieces, elsewhere = clones(whole), clones(whole)
    options = {**rule.hyper, "grad_scale": torch.tensor([0.3])}
    torch.set_num_threads(2)
    rule.run(**whole, **options)
    torch.set_num_threads(1)
    for a, b in zip((0, *cuts), (*cuts, N), strict=True):
        rule.run(**{name: tensor[a:b] for name, tensor in pieces.items()}, **options)
    halves = [{k: t[:3000] for k, t in elsewhere.items()}, {k: t[3000:] for k, t in elsewhere.items()}]
    workers = [threading.Thread(target=rule.run, kwargs={**half, **options}) for half in halves]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert_same_representation(whole, pieces)
    assert_same_representation(whole, elsewhere)


TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads where Linux lists them")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="OpenMP starts no thread on one core")
def test_a_worker_thread_takes_torchs_number_of_threads() -> None:
    """OpenMP gives a thread that asked torch for nothing yet all cores."""
    rule = RULES["adamw, bf16"]
    chunk, counts = tensors(rule, 100_000), []

    def work() -> None:
        counts.append(len(list(TASKS.iterdir())))
        rule.run(**chunk, **rule.hyper)
        counts.append(len(list(TASKS.iterdir())))

    rule.run(**chunk, **rule.hyper)
    torch.set_num_threads(1)
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert counts[0] == counts[1]


def test_views_of_one_buffer_are_updated_in_place() -> None:
    """The stream's tiles lie in one slab: the compiler must not take them for each other."""
    rule = RULES["adamw, fp32"]
    apart = tensors(rule)
    slab = torch.cat(list(apart.values()))
    views = dict(zip(apart, slab.split(N), strict=True))
    rule.run(**apart, **rule.hyper)
    rule.run(**views, **rule.hyper)
    assert_same_representation(apart, views)


def test_no_schedule_and_no_size_compiles_again() -> None:
    rule = RULES["adamw, bf16"]
    rule.run(**tensors(rule), **rule.hyper)
    before = dict(host_step._choice.passes)
    torch._dynamo.utils.counters.clear()
    for step in range(1, 40):
        chunk = {name: t[step % 7 :] for name, t in tensors(rule, 200 + 131 * step).items()}
        torch.set_num_threads(1 + step % 2)
        lr, scale = 1e-3 / step, torch.tensor(1.0 / step)
        rule.run(**chunk, **{**rule.hyper, "step": step, "lr": lr, "grad_scale": scale})
    assert host_step._choice.passes == before
    assert not torch._dynamo.utils.counters["inductor"] and not torch._dynamo.utils.counters["stats"]


def test_fifty_steps_follow_torch_in_fp64() -> None:
    master, exp_avg, exp_avg_sq = torch.randn(257), torch.zeros(257), torch.zeros(257)
    exact = master.double().requires_grad_()
    optimizer = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 51):
        grad = torch.randn(257)
        exact.grad = grad.double()
        optimizer.step()
        options = {"step": step, "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        adamw_(master, exp_avg, exp_avg_sq, grad, **options)
    torch.testing.assert_close(master.double(), exact.detach(), **tolerance(torch.float32, num_summed=50))


@ruled
@pytest.mark.parametrize("flag", [0.0, 1.0, float("nan")])
def test_found_inf_leaves_everything_untouched(rule: Rule, flag: float) -> None:
    ours = tensors(rule, 1500)
    before = clones(ours)
    rule.run(**ours, found_inf=torch.tensor(flag), **rule.hyper)
    if flag != 0:
        assert_same_representation(ours, before)
    else:
        assert not torch.equal(ours["master"], before["master"])


@ruled
def test_nothing_to_do(rule: Rule) -> None:
    rule.run(**tensors(rule, 0), **rule.hyper)
    one, plain = tensors(rule, 1), tensors(rule, 1)
    rule.run(**one, **rule.hyper)
    rule.reference(**plain, **rule.hyper)
    torch.testing.assert_close(one["master"], plain["master"], **tolerance(torch.float32))


def test_random_rounding_stays_chunked() -> None:
    rule = RULES["adamw, bf16"]
    ours, chunked = tensors(rule), tensors(rule)
    options = {**rule.hyper, "stochastic_rounding_seed": 7}
    rule.run(**ours, **options)
    host_step.use_host_step("chunked")
    rule.run(**chunked, **options)
    assert_same_representation(ours, chunked)


def test_the_choice_follows_the_size_and_is_made_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tritonspeed")
    host_step.use_host_step("auto")
    assert host_step.host_step() == "chunked"
    assert host_step.choose_host_step(host_step.COMPILED_FROM_ELEMS) == "compiled"
    assert host_step.choose_host_step(10) == host_step.host_step() == "compiled", "made once"
    host_step.use_host_step("auto")
    assert host_step.choose_host_step(10) == "chunked"
    assert host_step.choose_host_step(10**12) == "chunked"
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "optimizer step on the host: compiled (100,000,000 elements)",
        "optimizer step on the host: chunked (10 elements are too few to compile for)",
    ]
    host_step.use_host_step("chunked")
    assert host_step.choose_host_step(10**12) == "chunked", "decided by hand"
    with pytest.raises(ValueError, match="form is 'fast', must be one of auto, compiled, chunked"):
        host_step.use_host_step("fast")


def test_a_wrong_program_is_not_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(host_step._choice, "passes", {})
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda *_, **__: lambda *_: ())
    rule = RULES["adamw, fp32"]
    ours, chunked = tensors(rule), tensors(rule)
    rule.run(**ours, **rule.hyper)
    assert host_step.host_step() == "chunked"
    assert "chunked, compiling it failed: RuntimeError: adamw_maths, float32 gradient, no copy" in caplog.text
    rule.run(**chunked, **rule.hyper)
    assert_same_representation(ours, chunked)


CHILD = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from tritonspeed.kernels import adamw_, host_step
print(host_step.choose_host_step(10**9))
master, exp_avg, exp_avg_sq, grad = (torch.ones(5000) for _ in range(4))
adamw_(master, exp_avg, exp_avg_sq, grad, step=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
print(host_step.host_step(), bool((master < 1).all()))
"""


@pytest.mark.parametrize("lack", ["compiler", "compiler that works"])
def test_without_a_compiler_a_process_is_chunked(lack: str, tmp_path: Any) -> None:
    environment = {"PATH": "/usr/bin:/bin", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    if lack == "compiler":
        environment["CXX"] = "no-such-compiler"
    else:
        broken = tmp_path / "g++"
        broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo g++ 12 && exit 0\nexit 1\n')
        broken.chmod(0o755)
        environment["CXX"] = str(broken)
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    chosen, taken = done.stdout.split("\n")[:2]
    assert (chosen, taken) == ("compiled" if lack == "compiler that works" else "chunked", "chunked True")
    reason = "chunked, compiling it failed" if chosen == "compiled" else "chunked (nothing can be compiled: "
    assert done.stderr.count(f"optimizer step on the host: {reason}") == 1, done.stderr
