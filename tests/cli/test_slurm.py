"""SLURM's variables, its short form of node names, and the srun line."""

from __future__ import annotations

import pytest

from tritonspeed.cli import slurm

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("one", ("one",)),
        ("a,b", ("a", "b")),
        ("n[1-3]", ("n1", "n2", "n3")),
        ("gpu[08-10,2],cpu7", ("gpu08", "gpu09", "gpu10", "gpu2", "cpu7")),
        ("r[1-2]n[3,5]-ib", ("r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib")),
    ],
)
def test_expand_nodelist(text: str, names: tuple[str, ...]) -> None:
    assert slurm.expand_nodelist(text) == names


def test_a_step_of_several_nodes_gives_the_place() -> None:
    step = slurm.current_step(STEP)
    assert step is not None
    assert (step.num_nodes, step.node_rank, step.hosts) == (3, 1, ("gpu08", "gpu09", "gpu10"))
    assert step.master_port == 23456
    assert slurm.allocation_nodes(STEP) == 0


def test_no_step() -> None:
    assert slurm.current_step({}) is None
    assert slurm.current_step({**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}) is None
    batch = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "0"}
    assert slurm.current_step(batch) is None
    assert slurm.allocation_nodes(batch) == 4
    assert slurm.allocation_nodes({}) == 0


def test_one_task_per_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="24 tasks on 3 nodes.*--ntasks-per-node=1"):
        slurm.current_step({**STEP, "SLURM_STEP_NUM_TASKS": "24"})


def test_srun_line() -> None:
    line = slurm.srun_line(2, ["a", "b"], ["--partition=x"], ["python", "train.py"])
    assert line[0] == "srun"
    assert line[-3:] == ["--partition=x", "python", "train.py"]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=a,b", "--kill-on-bad-exit=1"} <= set(line)
    assert not any(word.startswith("--node") for word in slurm.srun_line(None, [], [], [])[:3])
