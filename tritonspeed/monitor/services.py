"""Writers to services, through the library of each; what DeepSpeed's config gives them, in the same places."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tritonspeed.monitor.outbox import Entry, Event


class RunWriter:
    """wandb and Trackio, which have the same calls: a run that is begun, and figures by step.

    Args:
        block: "wandb" or "trackio" of the config.
        name: that name.
    """

    def __init__(self, block: Any, name: str) -> None:
        self.name, self._library = name, import_module(name)
        asked = {"project": block.project}
        if name == "wandb":
            asked |= {"group": block.group, "entity": block.team}
        self.run = self._library.init(**asked)

    def write(self, entries: Sequence[Entry]) -> None:
        """Log the figures of the same number of samples together."""
        together: dict[int, dict[str, float]] = {}
        for entry in entries:
            for event in entry.events:
                together.setdefault(event.samples, {})[event.name] = event.value
        for samples, figures in together.items():
            self._library.log(figures, step=samples)

    def close(self) -> None:
        """The library ends its run with the process: a script may go on logging to it."""


class CometWriter:
    """Comet's experiment, with a value of each name every ``samples_log_interval`` samples."""

    name = "comet"

    def __init__(self, block: Any) -> None:
        comet = import_module("comet_ml")
        keys = ("api_key", "project", "workspace", "experiment_key", "mode", "online")
        self.experiment = comet.start(**{key: getattr(block, key) for key in keys})
        if block.experiment_name is not None:
            self.experiment.set_name(block.experiment_name)
        self.samples_log_interval = block.samples_log_interval
        self._last: dict[str, int] = {}

    def write(self, entries: Sequence[Entry]) -> None:
        """Log the figures that are due."""
        for entry in entries:
            for event in entry.events:
                if self._is_due(event):
                    self._last[event.name] = event.samples
                    self.experiment.log_metric(event.name, event.value, step=event.samples)

    def _is_due(self, event: Event) -> bool:
        last = self._last.get(event.name)
        return last is None or event.samples - last >= self.samples_log_interval

    def close(self) -> None:
        """The library ends its experiment with the process: a script may go on logging to it."""
