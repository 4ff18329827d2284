"""SLURM: what a job step's variables say, and the srun line that makes one launcher run on each node."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SPLIT = re.compile(r",(?![^\[]*\])")  # a comma outside brackets


@dataclass(frozen=True)
class Step:
    """This process's place in an srun step of several nodes: one launcher on each."""

    num_nodes: int
    node_rank: int
    hosts: tuple[str, ...]
    job_id: int

    @property
    def master_port(self) -> int:
        """A port that two jobs on one node do not share, and on which all nodes of a job agree."""
        return 20000 + self.job_id % 10000


def allocation_nodes(env: Mapping[str, str]) -> int:
    """The number of nodes of the allocation this process is in and may start steps from; 0 outside of one."""
    if "SLURM_JOB_ID" not in env or _in_step(env):
        return 0
    return int(env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", "1")))


def current_step(env: Mapping[str, str]) -> Step | None:
    """The step this process is in, where it spans several nodes.

    Raises:
        ValueError: the step has several tasks on a node: each would start all of the node's ranks again.
    """
    if not _in_step(env):
        return None
    num_nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    num_tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    if num_tasks > num_nodes:
        raise ValueError(
            f"this srun step has {num_tasks} tasks on {num_nodes} nodes, and the launcher starts all ranks of a node "
            "itself: use srun --ntasks-per-node=1"
        )
    if num_nodes == 1:
        return None
    hosts = expand_nodelist(env["SLURM_STEP_NODELIST"])
    return Step(num_nodes, int(env["SLURM_NODEID"]), hosts, int(env["SLURM_JOB_ID"]))


def srun_line(
    num_nodes: int | None, nodelist: Sequence[str], extra: Sequence[str], command: Sequence[str]
) -> list[str]:
    """The words that start `command` once on each node, and end all of it when one node's fails.

    Args:
        num_nodes: None leaves it to the allocation.
        nodelist: the nodes to use; empty for any.
        extra: further options of srun, from --launcher_args.
        command: what runs on each node.
    """
    words = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if num_nodes is not None:
        words += [f"--nodes={num_nodes}", f"--ntasks={num_nodes}"]
    if nodelist:
        words.append(f"--nodelist={','.join(nodelist)}")
    return [*words, *extra, *command]


def expand_nodelist(text: str) -> tuple[str, ...]:
    """`a[01-03,7],b` as a01, a02, a03, a7, b: SLURM's short form, zeros kept."""
    names: list[str] = []
    for part in _SPLIT.split(text):
        names.extend(_expand(part))
    return tuple(names)


def _expand(name: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", name)
    if match is None:
        return [name]
    numbers: list[str] = []
    for item in match[1].split(","):
        first, dash, last = item.partition("-")
        last = last if dash else first
        numbers.extend(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    rest = _expand(name[match.end() :])
    return [name[: match.start()] + number + tail for number in numbers for tail in rest]


def _in_step(env: Mapping[str, str]) -> bool:
    # A batch script has the job's variables but stands outside any step that srun made.
    return "SLURM_STEP_ID" in env and "SLURM_STEP_NODELIST" in env
