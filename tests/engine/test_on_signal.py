"""A scheduler's signal asks for a save: on every rank at the same step, without ending anything by itself."""

import logging
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from engines import make, said, settings

from tritonspeed.comm import Mesh
from tritonspeed.engine.on_signal import SaveOnSignal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals")

TIMEOUT_S = 60
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}


@pytest.fixture
def on_signal():
    made = SaveOnSignal((signal.SIGTERM, signal.SIGUSR1))
    yield made
    made.close()


def test_a_signal_sets_a_flag_and_a_second_one_changes_nothing(on_signal):
    mesh = Mesh(0, 1, torch.device("cpu"), "none")
    assert not on_signal.asked(mesh)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert on_signal.came in (signal.SIGUSR1, signal.SIGTERM)
    assert on_signal.asked(mesh) and on_signal.asked(mesh)


def test_in_a_forked_process_the_signal_does_what_it_did_before(on_signal):
    ours, theirs = mp.Pipe()

    def wait() -> None:
        theirs.send(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
        time.sleep(TIMEOUT_S)

    child = mp.get_context("fork").Process(target=wait, daemon=True)
    child.start()
    assert ours.poll(TIMEOUT_S) and ours.recv()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGTERM)
    child.join(TIMEOUT_S)
    assert child.exitcode == -signal.SIGTERM
    assert on_signal.came is None


def test_the_handlers_of_before_come_back():
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGUSR1)
        made = SaveOnSignal((signal.SIGUSR1,))
        assert signal.getsignal(signal.SIGUSR1) != mine
        made.close()
        assert signal.getsignal(signal.SIGUSR1) is mine
        made = SaveOnSignal((signal.SIGUSR1,))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # someone else took it
        made.close()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_the_main_thread_it_says_that_it_cannot():
    before = signal.getsignal(signal.SIGTERM)
    made = []
    with said(logging.WARNING) as lines:
        thread = threading.Thread(target=lambda: made.append(SaveOnSignal()))
        thread.start()
        thread.join()
    assert lines == [
        "SIGTERM would end this process unsaved: handlers can only be set in the main thread, so call initialize()"
        " there"
    ]
    assert signal.getsignal(signal.SIGTERM) == before
    assert not made[0].asked(Mesh(0, 1, torch.device("cpu"), "none"))
    made[0].close()


STEPS = """
import sys, time, torch
from pathlib import Path
from tritonspeed import comm
from tritonspeed.engine.on_signal import SaveOnSignal
import torch.distributed as dist

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh, on_signal, step = comm.mesh_of(), SaveOnSignal(), 0
while True:
    step += 1
    time.sleep(0.01)
    (folder / f"at-{rank}").write_text(str(step))
    if on_signal.asked(mesh):
        break
(folder / f"saving-{rank}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
(folder / f"saved-{rank}").write_text(str(step))
dist.destroy_process_group()
raise SystemExit(143)
"""


def start_two(folder: Path, program: str, *arguments: str) -> list[subprocess.Popen]:
    script = folder / "ranks.py"
    script.write_text(program)
    command = [sys.executable, str(script)]
    root = Path(__file__).parents[2]
    return [subprocess.Popen([*command, str(rank), str(folder), *arguments], cwd=root) for rank in range(2)]


def end(processes: list[subprocess.Popen]) -> None:
    for each in processes:
        each.kill()
        each.wait()


def wait_for(path: Path, processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < end and all(each.poll() is None for each in processes), path
        time.sleep(0.01)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_another_does_not_end_the_save(tmp_path):
    processes = start_two(tmp_path, STEPS)
    try:
        for rank in range(2):
            wait_for(tmp_path / f"at-{rank}", processes)
        processes[1].send_signal(signal.SIGTERM)
        for rank in range(2):
            wait_for(tmp_path / f"saving-{rank}", processes)
        processes[0].send_signal(signal.SIGTERM)
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(0.1)  # they arrive
        (tmp_path / "go").touch()
        assert [each.wait(TIMEOUT_S) for each in processes] == [143, 143]
        assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text()
    finally:
        end(processes)


TRAINS = """
import sys, time, torch
from pathlib import Path
import torch.distributed as dist
import tritonspeed as ts

rank, folder, background = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "background"
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 2},
    "checkpoint": {
        "save_on_sigterm": True, "exit_code": 85, "save_dir": str(folder / "saved"), "async_save": background
    },
}
engine, *_ = ts.initialize(model=torch.nn.Linear(8, 8), config=config, dist_init_required=False)
while True:
    engine.backward(engine(torch.rand(2, 8)).square().mean())
    engine.step()
    (folder / f"at-{rank}").write_text(str(engine.micro_steps))
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", ["waiting", "background"])
def test_a_run_is_saved_on_all_ranks_and_ends_with_the_code_that_was_asked_for(tmp_path, how):
    processes = start_two(tmp_path, TRAINS, how)
    try:
        for rank in range(2):
            wait_for(tmp_path / f"at-{rank}", processes)
        processes[1].send_signal(signal.SIGTERM)
        assert [each.wait(TIMEOUT_S) for each in processes] == [85, 85]
    finally:
        end(processes)
    num_micro = int((tmp_path / "at-0").read_text()) + 1  # the one that was under way was brought to its end
    engine = make({**settings(1, accumulation=2), "optimizer": ADAMW}, torch.nn.Linear(8, 8))
    path, _ = engine.load_checkpoint(tmp_path / "saved")
    assert path == str(tmp_path / "saved" / f"global_step{num_micro // 2}")
    assert engine.global_steps == num_micro // 2
