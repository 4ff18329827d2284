"""Writers of files. CSV and TensorBoard have DeepSpeed's places, names and columns; JSON lines are our own.

<output_path>/<job_name>/Train_Samples_lr.csv     step,lr            one file for each name
<output_path>/<job_name>/events.out.tfevents...   tag Train/Samples/lr
<output_path>/<job_name>/steps.jsonl              {"time": ..., "samples": ..., "step": 1, "loss": ..., ...}
                         events.jsonl             {"name": ..., "value": ..., "samples": ...}: what users write
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tritonspeed.monitor.outbox import Entry


def folder_of(block: Any) -> Path:
    """The job's folder, made where it is missing.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(block.output_path or "") / block.job_name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class CsvWriter:
    """A file for each name; appended to, so that a resumed run goes on in it."""

    name = "csv_monitor"

    def __init__(self, block: Any) -> None:
        self.folder = folder_of(block)

    def write(self, entries: Sequence[Entry]) -> None:
        """Add rows; a new file has its columns' names first."""
        rows: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for entry in entries:
            for event in entry.events:
                rows[event.name].append((event.samples, event.value))
        for name, of_name in rows.items():
            path = self.folder / f"{name.replace('/', '_').replace(' ', '_')}.csv"
            with path.open("a", newline="") as file:
                writer = csv.writer(file)
                if file.tell() == 0:
                    writer.writerow(["step", name.rpartition("/")[2]])
                writer.writerows(of_name)

    def close(self) -> None:
        """Every file is closed as it is written."""


class JsonlWriter:
    """All facts of each step, and the events of users, as lines of JSON."""

    name = "jsonl_monitor"

    def __init__(self, block: Any) -> None:
        self.folder = folder_of(block)

    def write(self, entries: Sequence[Entry]) -> None:
        """Add lines."""
        self._add("steps.jsonl", (entry.step for entry in entries if entry.step is not None))
        own = (event._asdict() for entry in entries if entry.step is None for event in entry.events)
        self._add("events.jsonl", own)

    def _add(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(finite(record), allow_nan=False) + "\n" for record in records)
        if text:
            with (self.folder / name).open("a") as file:
                file.write(text)

    def close(self) -> None:
        """Every file is closed as it is written."""


class TensorboardWriter:
    """TensorBoard's event file; ``summary_writer`` is the SummaryWriter, for whoever has histograms to add."""

    name = "tensorboard"

    def __init__(self, block: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.summary_writer = SummaryWriter(log_dir=str(folder_of(block)))

    def write(self, entries: Sequence[Entry]) -> None:
        """Add scalars, and see them into the file."""
        for entry in entries:
            for event in entry.events:
                self.summary_writer.add_scalar(event.name, event.value, event.samples)
        self.summary_writer.flush()

    def close(self) -> None:
        """End the file."""
        self.summary_writer.close()


def finite(value: Any) -> Any:
    """``value`` as JSON can have it: figures that are not finite are None, whatever else is no JSON is its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
