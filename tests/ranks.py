"""Real gloo ranks for tests: processes that live as long as the session and run one function after another.

A world is started once (forkserver: torch is imported once) and reused, so a distributed case costs milliseconds. A
case
that fails or hangs takes its world down; the next one gets a new world.
"""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 120


def _load(path: str, name: str) -> Callable[..., Any]:
    """The function ``name`` of the test file at ``path``, in a process that pytest does not run in."""
    module_name = "ranked_" + pathlib.Path(path).stem
    if module_name not in sys.modules:
        folder = str(pathlib.Path(path).parent)
        for place in (str(pathlib.Path(__file__).parent), folder):
            if place not in sys.path:
                sys.path.insert(0, place)
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None, path
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(sys.modules[module_name], name)


def _serve(rank: int, world: int, meeting_point: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world)
    while True:
        job = pipe.recv()
        if job is None:
            break
        path, name, args = job
        try:
            torch.manual_seed(0)
            pipe.send((True, _load(path, name)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class World:
    """``size`` ranks that wait for work."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self.folder = tempfile.TemporaryDirectory()
        meeting_point = f"{self.folder.name}/meet"
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, meeting_point, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(*args)`` on every rank; the results in rank order. Raises the first rank's failure."""
        job = (function.__code__.co_filename, function.__name__, args)
        for pipe in self.pipes:
            pipe.send(job)
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            wait_s = TIMEOUT_S if not failures else 5
            if not pipe.poll(wait_s):
                failures.append(f"rank {rank}: no answer within {wait_s} s")
                continue
            good, value = pipe.recv()
            (results if good else failures).append(value if good else f"rank {rank}:\n{value}")
        if failures:
            self.stop(kill=True)
            raise AssertionError("\n".join(failures))
        return results

    def stop(self, kill: bool = False) -> None:
        """End the processes; ``kill`` does not wait for them to come back for work."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
            process.join(10)
        self.processes = []
        self.folder.cleanup()


class Worlds:
    """One world per size, started when first asked for."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def __call__(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        world = self._worlds.get(size)
        if world is None or not world.processes:
            world = self._worlds[size] = World(size)
        return world.run(function, *args)

    def stop(self) -> None:
        for world in self._worlds.values():
            if world.processes:
                world.stop()
