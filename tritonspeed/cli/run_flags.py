"""The flags of `tritonspeed run`: DeepSpeed's, in its spelling, and those of them that are refused, by name."""

from __future__ import annotations

import argparse

_REFUSED_LAUNCHERS = ("openmpi", "mpich", "impi", "mvapich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags. Everything after the script is the script's own."""
    where = parser.add_argument_group("where it runs")
    count = where.add_mutually_exclusive_group()
    for flag, text in (
        ("--num_gpus", "ranks on each host; by default all visible GPUs, or 1 rank where there is none"),
        ("--num_accelerators", "the same"),
        ("--num_procs", "the same"),
    ):
        count.add_argument(flag, dest="num_procs", type=_positive, metavar="N", help=text)
    where.add_argument("--num_nodes", metavar="N|MIN:MAX", help="hosts to use; with MIN:MAX, start with what arrives")
    where.add_argument("-i", "--include", default="", metavar="HOST:SLOT,SLOT@HOST", help="use only these slots")
    where.add_argument("-e", "--exclude", default="", metavar="HOST:SLOT,SLOT@HOST", help="use all but these slots")
    where.add_argument("-H", "--hostfile", metavar="FILE", help="lines 'NAME slots=N'")
    where.add_argument("--master_addr", metavar="ADDR", help="where the nodes meet; by default the first host")
    where.add_argument("--master_port", type=_positive, metavar="PORT", help="on one host: any free port; else 29500")
    where.add_argument("--node_rank", type=int, metavar="K", help="run only node K's ranks, here; implies --no_ssh")
    where.add_argument("--no_ssh", action="store_true", help="reach no other host: run only this one's ranks")
    where.add_argument("--no_ssh_check", action="store_true", help="accepted: ssh is not tried before it is needed")
    where.add_argument("--ssh_port", type=_positive, metavar="PORT", help="of ssh on the other hosts")
    where.add_argument("--launcher", default="ssh", metavar="ssh|slurm", help="how other hosts are reached")
    where.add_argument("--launcher_args", default="", metavar="'ARGS'", help="more options of ssh or srun")
    where.add_argument("--force_multi", action="store_true", help="take the way over ssh for a single host too")
    where.add_argument("--venv_script", default="", metavar="FILE", help="source this on each other host first")
    where.add_argument("--dry-run", "--dry_run", action="store_true", help="print each host's command and stop")
    _add_rank_arguments(parser.add_argument_group("what each rank gets"))
    refused = parser.add_argument_group("refused here")
    refused.add_argument("--elastic_training", action="store_true", help="use --num_nodes MIN:MAX")
    refused.add_argument("--min_elastic_nodes", metavar="N", help="use --num_nodes MIN:MAX")
    refused.add_argument("--max_elastic_nodes", metavar="N", help="use --num_nodes MIN:MAX")
    refused.add_argument("--autotuning", metavar="tune|run", help="use ts.estimate(model, config, world_size)")
    parser.add_argument("script", metavar="train.py", help="the script, the module or the program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")


def _add_rank_arguments(ranks: argparse._ArgumentGroup) -> None:
    kind = ranks.add_mutually_exclusive_group()
    kind.add_argument("--module", action="store_true", help="train.py is a module's name, as in python -m")
    kind.add_argument("--no_python", action="store_true", help="train.py is a program: start it without Python")
    ranks.add_argument("--no_local_rank", action="store_true", help="do not add --local_rank=N to its arguments")
    ranks.add_argument("--enable_each_rank_log", metavar="DIR", help="send each rank's output to a file in DIR")
    ranks.add_argument("--bind_cores_to_rank", action="store_true", help="give each rank cores of its own")
    ranks.add_argument("--bind_core_list", default="", metavar="0-3,8", help="the cores to give out")
    ranks.add_argument("--save_pid", action="store_true", help="write the launcher's process id to a temporary file")
    ranks.add_argument(
        "--log_level",
        default="critical",
        choices=("debug", "info", "warning", "error", "critical"),
        help="of torchrun's own log",
    )
    ranks.add_argument("-q", "--quiet", action="store_true", help="say nothing about what was chosen")


def refuse(args: argparse.Namespace) -> None:
    """Refuse what is not provided here, by name, with what does the same work.

    Raises:
        ValueError: such a flag, or flags that contradict each other.
    """
    if args.elastic_training or args.min_elastic_nodes or args.max_elastic_nodes:
        raise ValueError(
            "--elastic_training is not provided: the batch would change with the number of nodes. --num_nodes MIN:MAX "
            "starts with as many nodes as arrive; a checkpoint then goes on with another number"
        )
    if args.autotuning:
        raise ValueError(
            f"--autotuning {args.autotuning} is not provided: ts.estimate(model, config, world_size) computes "
            "the bytes of each stage without running anything"
        )
    if args.launcher in _REFUSED_LAUNCHERS:
        raise ValueError(
            f"--launcher {args.launcher} is not provided: use --launcher ssh with the same host file, or --launcher "
            "slurm, or start `tritonspeed run --no_ssh --num_nodes N --node_rank K --master_addr A` once on each host"
        )
    if args.launcher not in ("ssh", "pdsh", "slurm"):
        raise ValueError(f"--launcher {args.launcher}: there is ssh and slurm")
    if args.launcher == "pdsh" and args.launcher_args:
        raise ValueError(
            f"--launcher pdsh runs over ssh here, so --launcher_args {args.launcher_args!r} would reach the wrong "
            "program: use --launcher ssh with ssh's options"
        )
    if (args.include or args.exclude) and (args.num_nodes or args.num_procs):
        raise ValueError("--include/--exclude already say how many hosts and slots: drop --num_nodes and --num_gpus")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value
