"""wandb, Comet and Trackio through stand-ins of their libraries: what each is told, and what a missing one says."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tritonspeed.config import load
from tritonspeed.monitor import MonitorMaster

EVENTS = [("Train/Samples/lr", 0.1, 8), ("Train/Samples/train_loss", 2.0, 8)]
LATER = [("Train/Samples/lr", 0.2, 16)]


def config(**blocks):
    return load({"train_micro_batch_size_per_gpu": 1, **blocks})


def run(monitor):
    for events in (EVENTS, LATER):
        monitor.write_events(events)
        assert monitor.flush(10)
    monitor.close()


@pytest.fixture
def told(monkeypatch):
    """What the stand-ins heard."""
    heard = []

    class Experiment:
        def set_name(self, name):
            heard.append(("set_name", name))

        def log_metric(self, name, value, step):
            heard.append((name, value, step))

    for name in ("wandb", "trackio", "comet_ml"):
        module = ModuleType(name)
        module.init = lambda **asked: heard.append(asked)
        module.log = lambda figures, step: heard.append((dict(figures), step))
        module.start = lambda **asked: heard.append(asked) or Experiment()
        monkeypatch.setitem(sys.modules, name, module)
    return heard


def test_wandb_hears_of_the_run_and_of_each_step_at_once(told):
    run(MonitorMaster(config(wandb={"enabled": True, "project": "p", "group": "g", "team": "t"})))
    assert told == [
        {"project": "p", "group": "g", "entity": "t"},
        ({"Train/Samples/lr": 0.1, "Train/Samples/train_loss": 2.0}, 8),
        ({"Train/Samples/lr": 0.2}, 16),
    ]


def test_trackio_hears_the_same(told):
    run(MonitorMaster(config(trackio={"enabled": True})))
    assert told[0] == {"project": "deepspeed"} and told[2] == ({"Train/Samples/lr": 0.2}, 16)


@pytest.mark.parametrize(("interval", "rates"), [(8, [0.1, 0.2]), (9, [0.1])])
def test_comet_hears_of_a_name_every_so_many_samples(told, interval, rates):
    block = {"enabled": True, "project": "p", "experiment_name": "n", "samples_log_interval": interval}
    monitor = MonitorMaster(config(comet=block))
    assert monitor.comet_monitor.experiment is not None
    run(monitor)
    asked = dict.fromkeys(("api_key", "workspace", "experiment_key", "mode", "online"))
    assert told[:2] == [{**asked, "project": "p"}, ("set_name", "n")]
    assert [value for name, value, _ in told[2:] if name == "Train/Samples/lr"] == rates


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("wandb", "wandb", "pip install wandb"),
        ("comet", "comet_ml", 'pip install "comet_ml>=3.41.0"'),
        ("trackio", "trackio", "pip install trackio"),
        ("tensorboard", "tensorboard", "pip install tensorboard"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_library_is_named_on_every_rank(monkeypatch, tmp_path, name, package, install, rank):
    for loaded in [each for each in sys.modules if each.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError) as raised:
        MonitorMaster(config(**{name: {"enabled": True}}), rank)
    assert f'"{name}"' in str(raised.value) and install in str(raised.value)


def test_the_folder_that_wandb_leaves_is_not_wandb(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="pip install wandb"):
        MonitorMaster(config(wandb={"enabled": True}))
