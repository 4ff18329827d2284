"""Monitors by themselves: what stands in the files, and that no failure of theirs is a failure of the run."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest

from tritonspeed.config import load
from tritonspeed.monitor import MonitorMaster
from tritonspeed.monitor import outbox as outboxes
from tritonspeed.monitor.outbox import Entry, Event, Outbox


def config(**blocks):
    return load({"train_micro_batch_size_per_gpu": 1, **blocks})


def rows(path):
    return list(csv.reader(path.read_text().splitlines()))


@dataclass
class Report:
    step: int
    loss: float | None = 0.5
    grad_norm: float = 1.0
    forward_ms: float = 3.0
    backward_ms: float = 5.0
    step_ms: float = 1.0


def test_csv_has_a_file_for_each_name_and_goes_on_in_it(tmp_path):
    block = {"enabled": True, "output_path": str(tmp_path / "a" / "b"), "job_name": "run"}
    for first in (0, 2):
        monitor = MonitorMaster(config(csv_monitor=block))
        assert monitor.enabled
        monitor.write_events([("Own/plain accuracy", first + i, 10 * (first + i)) for i in range(2)])
        monitor.close()
    files = sorted(path.name for path in (tmp_path / "a" / "b" / "run").iterdir())
    assert files == ["Own_plain_accuracy.csv"]
    text = (tmp_path / "a" / "b" / "run" / files[0]).read_bytes()
    assert text == b"step,plain accuracy\r\n0,0\r\n10,1\r\n20,2\r\n30,3\r\n"


def test_a_step_is_written_under_deepspeeds_names_and_whole_as_json(tmp_path):
    where = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    monitor = MonitorMaster(config(csv_monitor=where, jsonl_monitor=where))
    monitor.write_step(Report(1), samples=8, lr=0.25, loss_scale=256.0, reduce_ms=2.0)
    monitor.write_step(Report(2, loss=None, grad_norm=float("inf")), samples=16, lr=0.5)
    monitor.write_events([("Own/x", 3, 16)])
    monitor.close()
    folder = tmp_path / "run"
    written = {path.name.removeprefix("Train_Samples_")[:-4]: rows(path)[1:] for path in folder.glob("*.csv")}
    times = {"forward": "3.0", "backward": "5.0", "backward_inner": "3.0", "backward_allreduce": "2.0", "step": "1.0"}
    assert written == {
        "lr": [["8", "0.25"], ["16", "0.5"]],
        "loss_scale": [["8", "256.0"]],
        "train_loss": [["8", "0.5"]],
        "Own_x": [["16", "3"]],
        **{f"elapsed_time_ms_{name}": [["8", value]] for name, value in times.items()},
    }
    first, second = map(json.loads, (folder / "steps.jsonl").read_text().splitlines())
    assert first.pop("time") == pytest.approx(time.time(), abs=60)
    assert first == {"samples": 8, **vars(Report(1))}
    assert second["grad_norm"] is None and second["loss"] is None
    assert json.loads((folder / "events.jsonl").read_text()) == {"name": "Own/x", "value": 3, "samples": 16}


def test_other_ranks_write_nothing_and_say_that_monitors_are_enabled(tmp_path):
    monitor = MonitorMaster(config(csv_monitor={"enabled": True, "output_path": str(tmp_path)}), rank=1)
    assert monitor.enabled and monitor.csv_monitor is None
    monitor.write_events([("a", 1, 1)])
    monitor.close()
    assert not list(tmp_path.iterdir())


def test_no_monitor_is_no_monitor():
    monitor = MonitorMaster(config())
    monitor.write_events([("a", 1, 1)])
    assert not monitor.enabled and monitor.flush()


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"csv_monitor: .*file/DeepSpeedJobName cannot be written .*output_path"):
        MonitorMaster(config(csv_monitor={"enabled": True, "output_path": str(tmp_path / "file")}))


class Recorder:
    """A writer that keeps what it gets, that fails from a call on, or hangs until ``go`` is set."""

    def __init__(self, name="recorder", fails_at=None, go=None):
        self.name, self.fails_at, self.go = name, fails_at, go
        self.got, self.calls, self.closed = [], 0, False

    def write(self, entries):
        self.calls += 1
        if self.go is not None:
            self.go.wait(20)
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise OSError(28, "No space left on device")
        self.got += [event for entry in entries for event in entry.events]

    def close(self):
        self.closed = True


def entry(i):
    return Entry([Event("a", i, i)])


def test_a_writer_that_fails_is_said_once_and_the_others_go_on(caplog):
    good, bad = Recorder("good"), Recorder("bad", fails_at=2)
    outbox = Outbox([bad, good])
    with caplog.at_level(logging.WARNING, "tritonspeed"):
        for i in range(4):
            outbox.put(entry(i))
            assert outbox.flush(10)
        outbox.close()
    assert [event.value for event in good.got] == [0, 1, 2, 3] and good.closed
    assert [event.value for event in bad.got] == [0] and bad.calls == 2
    assert [r.getMessage() for r in caplog.records] == [
        "bad is off from here on, training goes on: OSError: [Errno 28] No space left on device"
    ]


def test_a_writer_that_hangs_holds_nobody_up(caplog, monkeypatch):
    monkeypatch.setattr(outboxes, "MAX_WAITING", 100)
    monkeypatch.setattr(outboxes, "CLOSE_S", 0.2)
    go = threading.Event()
    stuck = Recorder("stuck", go=go)
    outbox = Outbox([stuck])
    with caplog.at_level(logging.WARNING, "tritonspeed"):
        outbox.put(entry(0))
        assert not outbox.flush(0.1)
        start = time.perf_counter()
        for i in range(150):
            outbox.put(entry(i))
        took_s = time.perf_counter() - start
        assert "not been written for too long" in caplog.text
        outbox.close()
    assert took_s < 1, "put() returns at once"
    go.set()
    assert not outbox.writers


def test_what_a_killed_process_wrote_is_there_but_for_the_last_half_second(tmp_path):
    program = f"""
import os, signal, time
from tritonspeed.config import load
from tritonspeed.monitor import MonitorMaster
block = {{"enabled": True, "output_path": {str(tmp_path)!r}}}
monitor = MonitorMaster(load({{"train_micro_batch_size_per_gpu": 1, "csv_monitor": block, "jsonl_monitor": block}}))
monitor.write_events([("a", 1, 1)])
time.sleep(1.5)
monitor.write_events([("a", 2, 2)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -9
    assert rows(tmp_path / "DeepSpeedJobName" / "a.csv")[:2] == [["step", "a"], ["1", "1"]]


def test_a_process_that_ends_has_written_all_and_a_full_disk_does_not_end_it(tmp_path):
    """The limit on a file's size stands in for a full disk: real writes fail, of every kind of file."""
    program = f"""
import resource, signal, sys
from tritonspeed.config import load
from tritonspeed.monitor import MonitorMaster
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = {str(tmp_path)!r}
given = {{"train_micro_batch_size_per_gpu": 1}}
for name in ("csv_monitor", "jsonl_monitor", "tensorboard"):
    given[name] = {{"enabled": True, "output_path": folder, "job_name": name}}
full, fine = MonitorMaster(load(given)), MonitorMaster(load({{**given, "csv_monitor": {{"enabled": True,
    "output_path": folder, "job_name": "fine"}}, "tensorboard": {{}}, "jsonl_monitor": {{}}}}))
full.write_events([("a", 1, 1)])
full.flush(20)
resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
for i in range(200):
    full.write_events([("a", float(i), i)])
full.flush(20)
fine.write_events([("b", 1, 1)])
print("the end")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout == "the end\n", done.stderr
    assert rows(tmp_path / "fine" / "b.csv") == [["step", "b"], ["1", "1"]]
    assert done.stderr.count("is off from here on, training goes on: OSError: [Errno 27] File too large") == 3, (
        done.stderr
    )
