"""The demo end to end, a few steps of it; its text, its model and its schedule by themselves."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

import tritonspeed as ts
from tritonspeed import cli
from tritonspeed import config as configs
from tritonspeed.cli import demo, demo_train
from tritonspeed.cli.demo_model import GPT, GPTConfig, next_byte_loss, write
from tritonspeed.cli.demo_text import HELD_OUT_EVERY, even_windows, load_corpus, random_windows

CONFIG = Path(__file__).parents[2] / "examples" / "ds_config.json"
LIMIT_S = 90  # the demo itself has four minutes, and takes a fraction of one here
NUM_STEPS = 24
UNIFORM_LOSS = math.log(256)


@pytest.fixture
def small_gpt() -> GPT:
    return GPT(GPTConfig(num_blocks=2, hidden_size=24, num_heads=3, max_bytes=11))


@pytest.mark.slow
def test_a_short_demo_learns_and_leaves_its_folder(start: Any, tmp_path: Path) -> None:
    words = ("demo", "--config", str(CONFIG), "--out", str(tmp_path / "out"), "--steps", str(NUM_STEPS))
    process = start(*words)
    shown, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, error

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    loss = summary["held_out_loss"]
    assert abs(loss["before"] - UNIFORM_LOSS) < 0.5, "an untrained model knows nothing"
    assert loss["after"] < loss["before"] - 2
    assert f"{loss['before']:.3f} before, {loss['after']:.3f} after" in shown
    assert (summary["ranks"], summary["stage"], summary["steps"]) == (2, 3, NUM_STEPS)
    assert 5e6 <= summary["num_parameters"] <= 10e6
    assert summary["sample"]["text"].startswith("def ")

    stages = summary["stages"]
    assert [row["stage"] for row in stages] == [0, 1, 2, 3]
    assert all(row["losses"] == stages[0]["losses"] for row in stages), "the stage changed a bit of a loss"
    for row in stages:
        for when in ("rest_bytes", "peak_bytes"):
            measured, computed = (sum(row[when][how].values()) for how in ("measured", "computed"))
            assert measured == pytest.approx(computed, rel=0.03), (row["stage"], when)
    peaks = [sum(row["peak_bytes"]["measured"].values()) for row in stages]
    assert peaks == sorted(peaks, reverse=True) and peaks[3] < 0.6 * peaks[0]

    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, NUM_STEPS + 1))
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert (held_out[0], held_out[-1]) == (loss["before"], loss["after"])
    for name in ("loss.png", "bytes.png"):
        picture = image.imread(tmp_path / "out" / name)
        assert min(picture.shape[:2]) > 300 and picture.std() > 0.05, f"{name} is empty"


@pytest.mark.slow
def test_the_example_script_trains_under_the_same_config(start: Any) -> None:
    script = CONFIG.with_name("train.py")
    process = start("run", "--num_procs", "2", str(script), "--deepspeed_config", str(CONFIG), "--steps", "80")
    shown, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, error
    losses = [float(loss) for loss in re.findall(r"^step \d+ · loss (\S+)", shown, re.MULTILINE)]
    assert len(losses) == 2 and losses[-1] < 0.05, "a tenth of the sine's variance"
    assert "ZeRO stage 3 · 2 rank(s)" in shown


def test_a_machine_that_became_slower_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_train, "AGREE_EVERY", 2)
    monkeypatch.setattr(demo_train, "HELD_OUT_ROWS", 4)
    monkeypatch.setattr(demo_train, "SAMPLE_BYTES", 3)
    metrics = io.StringIO()
    mesh = ts.comm.mesh_of()
    training = demo_train.Training(configs.load(CONFIG), load_corpus(None), mesh, 30, metrics)
    training.run(time_limit_s=0.0)
    summary = training.summary()
    assert summary["steps"] == 2
    last = json.loads(metrics.getvalue().splitlines()[-1])
    assert (last["step"], last["held_out_loss"]) == (2, summary["held_out_loss"]["after"])


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    demo._draw(tmp_path)
    assert "pip install 'tritonspeed[plots]'" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--data", "nowhere"), "no such file or folder"),
        (("--data", "short.txt"), "13 held out"),
        (("--ranks", "0"), "--ranks 0 must be positive"),
        (("--seconds", "-1"), "--seconds -1.0 must be positive"),
        (("--steps", "0"), "--steps 0 must be positive"),
    ],
)
def test_mistakes_are_told_before_a_rank_starts(
    words: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("short.txt").write_text("x" * 130)
    assert cli.main(["demo", "--config", str(CONFIG), *words]) == 2
    assert complaint in capsys.readouterr().err


def test_a_folder_is_held_out_by_file_and_a_file_by_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden" / "a").write_bytes(b"h" * 999)
    (folder / "binary").write_bytes(b"\0" * 999)
    for number in range(3 * HELD_OUT_EVERY):
        (folder / f"{number}.txt").write_bytes(bytes([65 + number]) * 400)
    corpus = load_corpus(str(folder))
    train, held_out = set(corpus.train.tolist()), set(corpus.held_out.tolist())
    assert train & held_out == {ord("\n")}, "a file is on one side only; between files stands a newline"
    assert len(held_out) == 3 + 1
    assert train | held_out == {*range(65, 65 + 3 * HELD_OUT_EVERY), ord("\n")}, "nothing hidden, nothing binary"
    again = load_corpus(str(folder))
    assert torch.equal(corpus.train, again.train) and torch.equal(corpus.held_out, again.held_out)

    one = tmp_path / "one.txt"
    one.write_bytes(bytes(range(1, 201)) * 60)
    corpus = load_corpus(str(one))
    assert bytes(torch.cat([corpus.train, corpus.held_out]).tolist()) == one.read_bytes()
    assert len(corpus.held_out) == len(one.read_bytes()) // HELD_OUT_EVERY


def test_the_default_text_is_python() -> None:
    corpus = load_corpus(None)
    assert len(corpus.train) > 2_000_000 and b"import " in bytes(corpus.held_out.tolist())


def test_windows_are_the_text_and_its_next_bytes() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    for inputs, targets in (even_windows(text, 7, 13), random_windows(text, 7, 13, seed=3)):
        assert inputs.shape == targets.shape == (7, 13)
        assert torch.equal(inputs + 1, targets)
    inputs, targets = even_windows(text, 7, 13)
    assert inputs[0, 0] == 0 and targets[-1, -1] == 99
    assert torch.equal(random_windows(text, 7, 13, seed=3)[0], random_windows(text, 7, 13, seed=3)[0])
    assert not torch.equal(random_windows(text, 7, 13, seed=3)[0], random_windows(text, 7, 13, seed=4)[0])


def test_a_byte_sees_what_stands_before_it_and_nothing_else(small_gpt: GPT) -> None:
    text = torch.randint(256, (2, 11))
    changed = text.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 256
    before, after = small_gpt(text), small_gpt(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all(), "every later byte sees the change"


def test_the_loss_is_in_nats_per_byte() -> None:
    targets = torch.randint(256, (3, 5))
    assert float(next_byte_loss(torch.zeros(3, 5, 256), targets)) == pytest.approx(UNIFORM_LOSS)


def test_writing_goes_on_past_the_longest_input_and_follows_its_seed(small_gpt: GPT) -> None:
    text = write(small_gpt, b"def ", 30, max_bytes=11, temperature=1.0, seed=1)
    assert len(text) == 34 and text.startswith(b"def ")
    assert text == write(small_gpt, b"def ", 30, max_bytes=11, temperature=1.0, seed=1)
    assert text != write(small_gpt, b"def ", 30, max_bytes=11, temperature=1.0, seed=2)


@pytest.mark.parametrize("num_steps", [1, 24, 300])
def test_the_schedule_ends_with_the_training(num_steps: int) -> None:
    schedule = demo_train._end_schedule_at(configs.load(CONFIG), num_steps).scheduler
    assert schedule is not None
    assert schedule.params["total_num_steps"] == max(2, num_steps)
    assert schedule.params["warmup_num_steps"] <= max(2, num_steps // 4)
    assert demo_train._end_schedule_at(configs.load({"train_batch_size": 2}), num_steps).scheduler is None


def test_the_installed_demo_has_the_example_config():
    from tritonspeed.cli.demo import CONFIG

    example = Path(__file__).parents[2] / "examples/ds_config.json"
    assert CONFIG.read_text(encoding="utf-8") == example.read_text(encoding="utf-8")
