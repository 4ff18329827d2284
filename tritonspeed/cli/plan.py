"""The torchrun line of each host. Pure: no environment is read and nothing is started here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from tritonspeed.cli.hosts import Slots, parse_core_list, split_cores

DEFAULT_MASTER_PORT = 29500
"""torchrun's and DeepSpeed's."""


@dataclass(frozen=True)
class Script:
    """What every rank runs, and how.

    Args:
        kind: "script" (a Python file), "module" or "program" (started as it is, without Python).
        target: the file, module or program.
        arguments: its own arguments.
        pass_local_rank: add `--local_rank=N` to them.
        bind_cores: "" binds nothing, "all" shares out the cores of the host, "0-3,8" shares out those.
        log_file: where output goes instead of the terminal, with "{rank}" in it; "" for the terminal.
    """

    kind: str
    target: str
    arguments: tuple[str, ...] = ()
    pass_local_rank: bool = True
    bind_cores: str = ""
    log_file: str = ""

    def entry(self) -> tuple[str, ...]:
        """The end of the torchrun line: the module that every rank starts with, its options, the target."""
        words = ["--module", "tritonspeed.cli.rank_entry"]
        if self.kind != "script":
            words += ["--kind", self.kind]
        if self.pass_local_rank:
            words.append("--pass-local-rank")
        if self.bind_cores:
            words += ["--bind-cores", self.bind_cores]
        if self.log_file:
            words += ["--log-file", self.log_file]
        return (*words, self.target, *self.arguments)


@dataclass(frozen=True)
class HostPlan:
    """What runs on one host: `python -m torch.distributed.run` with `torchrun`, under the variables `env`.

    `node_rank` is None where the nodes number themselves.
    """

    host: str
    node_rank: int | None
    num_procs: int
    torchrun: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def shell_line(self, python: str = "python") -> str:
        """The line to type on that host."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*variables, shlex.join([python, "-m", "torch.distributed.run", *self.torchrun])])


def plan_single(script: Script, num_procs: int, env: Mapping[str, str], master_port: int | None) -> HostPlan:
    """All ranks on this machine. Without a `master_port` the system picks a free one, so that runs do not collide."""
    if master_port is None:
        # The address keeps torchrun from looking up this machine's name, which a container may not resolve.
        meeting = ("--standalone", "--local-addr", "127.0.0.1")
    else:
        meeting = ("--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", str(master_port))
    torchrun = (*meeting, "--nproc-per-node", str(num_procs), *script.entry())
    return HostPlan("localhost", 0, num_procs, torchrun, {**env, **_thread_env(script, num_procs)})


def plan_node(
    script: Script, host: str, node_rank: int, num_nodes: int, num_procs: int, env: Mapping[str, str], master: str
) -> HostPlan:
    """One node of several.

    Args:
        script: what every rank runs.
        host: the node's name, for the reader.
        node_rank: its place, from 0; node 0 is at `master`.
        num_nodes: how many there are.
        num_procs: ranks on this node.
        env: variables of this node.
        master: ADDRESS:PORT where the nodes meet.
    """
    address, _, port = master.rpartition(":")
    meeting = ("--nnodes", str(num_nodes), "--node-rank", str(node_rank))
    torchrun = (*meeting, "--nproc-per-node", str(num_procs), "--master-addr", address, "--master-port", port)
    variables = {**env, **_thread_env(script, num_procs)}
    return HostPlan(host, node_rank, num_procs, (*torchrun, *script.entry()), variables)


def plan_elastic(
    script: Script, host: str, num_nodes: str, num_procs: int, env: Mapping[str, str], master: str
) -> HostPlan:
    """One node of MIN:MAX: the nodes number themselves as they arrive at `master` (ADDRESS:PORT)."""
    meeting = ("--nnodes", num_nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", master, "--rdzv-id", "tritonspeed")
    torchrun = (*meeting, "--nproc-per-node", str(num_procs), *script.entry())
    return HostPlan(host, None, num_procs, torchrun, {**env, **_thread_env(script, num_procs)})


def subset_env(slots: tuple[int, ...], have: tuple[int, ...]) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES where only some of a host's slots are used. Where all are, the host's own value stands."""
    return {} if slots == have else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, slots))}


def plan_hosts(
    script: Script, chosen: Slots, hosts: Slots, env: Mapping[str, str], master: str, elastic: str = ""
) -> list[HostPlan]:
    """One plan for each host of `chosen`.

    Args:
        script: what every rank runs.
        chosen: the slots in use on each host, in the order of node ranks.
        hosts: the slots each host has.
        env: variables of every host.
        master: ADDRESS:PORT where the nodes meet.
        elastic: "MIN:MAX" for nodes that number themselves as they arrive; "" for the order of `chosen`.
    """
    plans = []
    for node_rank, (host, slots) in enumerate(chosen.items()):
        own = {**env, **subset_env(slots, hosts[host])}
        if elastic:
            plans.append(plan_elastic(script, host, elastic, len(slots), own, master))
        else:
            plans.append(plan_node(script, host, node_rank, len(chosen), len(slots), own, master))
    return plans


def _thread_env(script: Script, num_procs: int) -> dict[str, str]:
    """One thread per core for ranks bound to a list of cores; elsewhere the host's own count decides, on the host."""
    if script.bind_cores in ("", "all"):
        return {}
    return {"OMP_NUM_THREADS": str(len(split_cores(parse_core_list(script.bind_cores), 0, num_procs)))}
