"""`tritonspeed run [flags] train.py ...`: DeepSpeed's launcher, over torchrun.

DeepSpeed's flags keep their meaning. What differs, and why:

- Without a GPU one rank is started unless --num_gpus (or --num_procs, the same) says otherwise.
- CUDA_VISIBLE_DEVICES is honoured: what it hides is not used.
- On one machine the system picks a free port unless --master_port is given: two runs do not collide.
- Other hosts are reached by ssh or srun, never by pdsh; a host file of one other host is reached too, where DeepSpeed
  would run on this machine.
- The first rank that fails ends all ranks within seconds, and its traceback is the last thing printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tritonspeed.cli import slurm, variables
from tritonspeed.cli.hosts import Slots, limit, parse_hostfile, parse_node_list, select_slots, visible_devices
from tritonspeed.cli.launch import launch, threads_per_rank
from tritonspeed.cli.plan import (
    DEFAULT_MASTER_PORT,
    HostPlan,
    Script,
    plan_elastic,
    plan_hosts,
    plan_node,
    plan_single,
    subset_env,
)
from tritonspeed.cli.remote import Ssh, command_for, is_this_machine, run_hosts
from tritonspeed.cli.run_flags import add_arguments, refuse
from tritonspeed.integrations.finder import FORCE_VARIABLE, path_variables, real_deepspeed

__all__ = ["add_arguments", "run"]

_DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's: images for clusters put theirs there


def run(args: argparse.Namespace) -> int:
    """Start the script, here, on other hosts, or as a SLURM step.

    Returns:
        0; the failing rank's exit status; 130 after Ctrl-C.

    Raises:
        ValueError: flags that contradict each other or the machine, or that are refused.
    """
    refuse(args)
    script = _script(args)
    env = variables.read_files(os.environ, Path.home(), Path.cwd())
    real = real_deepspeed({**os.environ, **env})
    if real is not None:
        _say(args, f"`import deepspeed` gives DeepSpeed {real} ({FORCE_VARIABLE}=1 gives tritonspeed)")
    env |= path_variables({**os.environ, **env})  # `import deepspeed` finds tritonspeed
    hosts = _read_hosts(args)
    if hosts:
        return _run_hosts(args, script, env, hosts)
    step = slurm.current_step(os.environ) if args.node_rank is None else None
    if step is None and (args.launcher == "slurm" or _in_larger_allocation(args)):
        return _run_srun(args)
    if step is not None:
        num_procs, own = _local_ranks(args)
        master = f"{args.master_addr or step.hosts[0]}:{args.master_port or step.master_port}"
        host = step.hosts[step.node_rank]
        plan = plan_node(script, host, step.node_rank, step.num_nodes, num_procs, {**env, **own}, master)
        return _run_here(args, [plan], plan)
    if args.num_nodes not in (None, "1"):
        return _run_one_of_many(args, script, env)
    num_procs, own = _local_ranks(args)
    plan = plan_single(script, num_procs, {**env, **own}, args.master_port)
    return _run_here(args, [plan], plan)


def _script(args: argparse.Namespace) -> Script:
    kind = "module" if args.module else "program" if args.no_python else "script"
    if kind == "script" and not Path(args.script).is_file():
        raise ValueError(f"there is no script {args.script!r} in {Path.cwd()} (a module wants --module)")
    log_file = ""
    if args.enable_each_rank_log:
        stamp = time.strftime("%Y%m%d%H%M%S")
        log_file = str(Path(args.enable_each_rank_log).absolute() / f"{stamp}_rank{{rank}}.log")
    cores = args.bind_core_list or ("all" if args.bind_cores_to_rank else "")
    return Script(kind, args.script, tuple(args.arguments), not args.no_local_rank, cores, log_file)


def _read_hosts(args: argparse.Namespace) -> Slots:
    """The slots of the host file; empty where there is none."""
    path = Path(args.hostfile or _DEFAULT_HOSTFILE)
    if path.is_file():
        return parse_hostfile(path.read_text(), str(path))
    if args.hostfile:
        raise ValueError(f"--hostfile {args.hostfile}: there is no such file in {Path.cwd()}")
    return {}


def _local_ranks(args: argparse.Namespace) -> tuple[int, dict[str, str]]:
    """How many ranks this machine runs where no host file says so, and the variables they need for it."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_devices = _num_devices()
    env: dict[str, str] = {}
    if args.include or args.exclude:
        shown = [word.strip() for word in (devices or "").split(",")]
        if devices and not all(word.isdigit() for word in shown):
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES={devices} names devices by identifier, which --include/--exclude cannot: unset "
                "it, or use --num_gpus"
            )
        have = tuple(map(int, shown)) if devices else tuple(range(num_devices))
        slots = select_slots({"localhost": have}, args.include, args.exclude)["localhost"]
        num_procs, env = len(slots), subset_env(slots, have)
    else:
        num_procs = args.num_procs or num_devices or 1
        if num_devices and num_procs > num_devices:
            hidden = f", CUDA_VISIBLE_DEVICES={devices}" if devices is not None else ""
            raise ValueError(
                f"{num_procs} ranks want a GPU each and {num_devices} are visible{hidden}: lower --num_gpus; for ranks "
                "on the CPU, set CUDA_VISIBLE_DEVICES to nothing"
            )
        if not num_devices and args.num_procs is None:
            _say(args, "no GPU is visible: 1 rank, on the CPU (--num_procs N for more)")
    if "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(threads_per_rank(num_procs))
    return num_procs, env


def _num_devices() -> int:
    import torch  # seconds to import: not for `--help`, nor for hosts whose file states their slots

    return torch.cuda.device_count()


def _run_hosts(args: argparse.Namespace, script: Script, env: dict[str, str], hosts: Slots) -> int:
    """Run on the hosts of a host file."""
    chosen = select_slots(hosts, args.include, args.exclude)
    low, high = _node_range(args, len(chosen))
    chosen = limit(chosen, min(high, max(low, len(chosen))), args.num_procs)
    names = list(chosen)
    alone = len(names) == 1 and not args.force_multi and is_this_machine(names[0])
    if alone and args.node_rank in (None, 0):
        slots = chosen[names[0]]
        plan = plan_single(script, len(slots), {**env, **_own_devices(slots, hosts[names[0]])}, args.master_port)
        return _run_here(args, [plan], plan)
    master = f"{args.master_addr or names[0]}:{args.master_port or DEFAULT_MASTER_PORT}"
    elastic = args.num_nodes if low != high else ""
    if args.no_ssh or args.node_rank is not None:
        plans = plan_hosts(script, chosen, hosts, env, master, elastic)
        mine = _own_number(args, names)
        own = _own_devices(chosen[names[mine]], hosts[names[mine]])
        return _run_here(args, plans, plans[mine], own)
    travelling = {**variables.travelling(os.environ), **env}
    plans = plan_hosts(script, chosen, hosts, travelling, master, elastic)
    if args.launcher == "pdsh":
        _say(args, "--launcher pdsh: the hosts are reached by ssh, one connection each; pdsh is not needed")
    ssh = Ssh(args.ssh_port, tuple(shlex.split(args.launcher_args)), args.venv_script)
    commands = {plan.host: command_for(plan, ssh, str(Path.cwd())) for plan in plans}
    if args.dry_run:
        return _print_plans(plans, commands)
    return run_hosts(commands)


def _node_range(args: argparse.Namespace, default: int) -> tuple[int, int]:
    """--num_nodes as (MIN, MAX); both `default` where it is not given."""
    text = args.num_nodes or str(default)
    low, colon, high = text.partition(":")
    if not low.isdigit() or (colon and not high.isdigit()) or not 1 <= int(low) <= int(high or low):
        raise ValueError(f"--num_nodes {text}: give N or MIN:MAX, with 1 ≤ MIN ≤ MAX")
    return int(low), int(high or low)


def _own_number(args: argparse.Namespace, names: list[str]) -> int:
    """This machine's place among the hosts."""
    if args.node_rank is not None:
        if not 0 <= args.node_rank < len(names):
            raise ValueError(f"--node_rank {args.node_rank}: there are {len(names)} hosts, {', '.join(names)}")
        return args.node_rank
    own = [number for number, name in enumerate(names) if is_this_machine(name)]
    if len(own) != 1:
        raise ValueError(f"--no_ssh: which of {', '.join(names)} is this machine? Say so with --node_rank")
    return own[0]


def _own_devices(slots: tuple[int, ...], have: tuple[int, ...]) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for some of this machine's slots, within what the variable already shows."""
    if slots == have:
        return {}
    return {"CUDA_VISIBLE_DEVICES": visible_devices(slots, os.environ.get("CUDA_VISIBLE_DEVICES"))}


def _run_one_of_many(args: argparse.Namespace, script: Script, env: dict[str, str]) -> int:
    """Run this machine's part of several nodes that no host file names."""
    low, high = _node_range(args, 1)
    if not args.master_addr or (args.node_rank is None and low == high and not args.dry_run):
        raise ValueError(
            f"--num_nodes {args.num_nodes} without a host file: on each node, say --master_addr (of node 0) and "
            "--node_rank; or give --hostfile"
        )
    num_procs, own = _local_ranks(args)
    env = {**env, **own}
    master = f"{args.master_addr}:{args.master_port or DEFAULT_MASTER_PORT}"
    if low != high:
        plan = plan_elastic(script, "each host", args.num_nodes, num_procs, env, master)
        return _run_here(args, [plan], plan)
    plans = [plan_node(script, f"node {rank}", rank, low, num_procs, env, master) for rank in range(low)]
    mine = None if args.dry_run else plans[_own_number(args, [plan.host for plan in plans])]
    return _run_here(args, plans, mine)


def _in_larger_allocation(args: argparse.Namespace) -> bool:
    alone = args.no_ssh or args.node_rank is not None or args.num_nodes == "1" or args.include or args.exclude
    return not alone and slurm.allocation_nodes(os.environ) > 1


def _run_srun(args: argparse.Namespace) -> int:
    """Start one launcher on each node of a SLURM allocation; each finds its place in the step's variables."""
    if args.exclude or any(parse_node_list(args.include, "--include").values() if args.include else ()):
        raise ValueError("under SLURM --include takes whole hosts; give srun's own options in --launcher_args")
    low, high = _node_range(args, 1)
    if low != high:
        raise ValueError(f"--num_nodes {args.num_nodes}: a SLURM step has a fixed number of nodes; give N")
    nodes = list(parse_node_list(args.include, "--include")) if args.include else []
    num_nodes = low if args.num_nodes else len(nodes) or slurm.allocation_nodes(os.environ) or None
    command = [sys.executable, "-m", "tritonspeed.cli", "run", *_node_flags(args), args.script, *args.arguments]
    line = slurm.srun_line(num_nodes, nodes, shlex.split(args.launcher_args), command)
    if args.dry_run:
        print(shlex.join(line))
        return 0
    if shutil.which("srun") is None:
        raise ValueError(f"srun is not on the path of this machine; where it is, this is the line: {shlex.join(line)}")
    _say(args, f"inside a SLURM allocation: {shlex.join(line)}")
    return subprocess.call(line)


def _node_flags(args: argparse.Namespace) -> list[str]:
    """The flags that the launcher on each node needs too."""
    words = []
    for name in ("module", "no_python", "no_local_rank", "bind_cores_to_rank", "save_pid", "quiet"):
        words += [f"--{name}"] if getattr(args, name) else []
    for name in ("num_procs", "master_addr", "master_port", "enable_each_rank_log", "bind_core_list", "log_level"):
        words += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
    return words


def _run_here(
    args: argparse.Namespace, plans: list[HostPlan], mine: HostPlan | None, own: dict[str, str] | None = None
) -> int:
    """Run this machine's plan, with the variables `own` on top; for a dry run, print all plans."""
    if args.dry_run:
        return _print_plans(plans, {})
    assert mine is not None, "only a dry run has no plan of its own"
    if args.venv_script or args.ssh_port:
        _say(args, "--venv_script and --ssh_port have no effect: no other host is reached")
    os.environ.update({**mine.env, **(own or {})})
    if not args.save_pid:
        return launch(mine.torchrun, log_level=args.log_level)
    pid_file = Path(tempfile.gettempdir()) / f"{os.getpid()}.ds"  # DeepSpeed's place and name
    pid_file.write_text(str(os.getpid()))
    try:
        return launch(mine.torchrun, log_level=args.log_level)
    finally:
        pid_file.unlink(missing_ok=True)


def _print_plans(plans: list[HostPlan], commands: dict[str, list[str]]) -> int:
    """Print a line to type on each host; where ssh would carry it there, the ssh command too, as a comment."""
    for plan in plans:
        place = "numbered on arrival" if plan.node_rank is None else f"node {plan.node_rank}"
        print(f"# {plan.host}: {place}, {plan.num_procs} ranks")
        if plan.host in commands:
            print(f"# started by: {shlex.join(commands[plan.host])}")
        print(plan.shell_line())
    return 0


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"tritonspeed run: {text}", file=sys.stderr)
