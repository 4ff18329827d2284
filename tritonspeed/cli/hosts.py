"""Which hosts, and which slots on each: the host file, `--include`/`--exclude`, and device numbers. Pure functions.

A *slot* is one rank's place on a host, numbered from 0; on a machine with GPUs slot i is GPU i.

    host file        worker-0 slots=4            one host a line; `#` starts a comment
    --include        worker-0@worker-1:0,2       all of worker-0, slots 0 and 2 of worker-1, nothing else
    --exclude        worker-1:0                  everything but slot 0 of worker-1
"""

from __future__ import annotations

import re

Slots = dict[str, tuple[int, ...]]
"""Host name to the slots in use there, in the order of node ranks."""

_HOST_LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\d+)")


def parse_hostfile(text: str, source: str = "hostfile") -> Slots:
    """Read a host file.

    Args:
        text: its contents.
        source: its name, for error messages.

    Returns:
        Host name to its slots, in file order, which is the order of node ranks.

    Raises:
        ValueError: a line of another form, a host named twice, a host without slots, no host at all.
    """
    hosts: Slots = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        match = _HOST_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{source}:{number}: {raw.strip()!r} is not of the form 'NAME slots=N'")
        name, slots = match["name"], int(match["slots"])
        if name in hosts:
            raise ValueError(f"{source}:{number}: host {name!r} stands here twice: give it one line with all its slots")
        if slots == 0:
            raise ValueError(f"{source}:{number}: host {name!r} has slots=0: give it slots or remove the line")
        hosts[name] = tuple(range(slots))
    if not hosts:
        raise ValueError(f"{source} names no host: write one line 'NAME slots=N' for each")
    return hosts


def parse_node_list(text: str, flag: str) -> dict[str, tuple[int, ...] | None]:
    """Read `NAME[:SLOT,SLOT...]@NAME...`, the value of --include or --exclude.

    Returns:
        Host name to the slots named, or None where the whole host is meant.
    """
    nodes: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        name, colon, slots = part.strip().partition(":")
        if not name or (colon and not re.fullmatch(r"\d+(,\d+)*", slots.replace(" ", ""))):
            raise ValueError(f"{flag} {text!r}: {part!r} is not of the form NAME or NAME:SLOT,SLOT")
        if name in nodes:
            raise ValueError(f"{flag} {text!r} names host {name!r} twice: list all its slots after one colon")
        numbers = tuple(int(slot) for slot in slots.split(",")) if colon else None
        if numbers is not None and len(set(numbers)) != len(numbers):
            raise ValueError(f"{flag} {text!r} names a slot of {name!r} twice")
        nodes[name] = numbers
    return nodes


def select_slots(hosts: Slots, include: str = "", exclude: str = "") -> Slots:
    """The slots that are left of `hosts` after --include or --exclude.

    Args:
        hosts: the slots each host has.
        include: keep only these. The order of hosts and of slots stays that of `hosts`.
        exclude: keep all but these.

    Raises:
        ValueError: both given, an unknown host, a slot the host does not have, nothing left.
    """
    if include and exclude:
        raise ValueError(f"--include {include!r} and --exclude {exclude!r} are both given: one of them says it all")
    if not include and not exclude:
        return dict(hosts)
    flag, text = ("--include", include) if include else ("--exclude", exclude)
    named = parse_node_list(text, flag)
    for name, slots in named.items():
        if name not in hosts:
            raise ValueError(f"{flag} {text!r}: there is no host {name!r}; the hosts are {', '.join(hosts)}")
        missing = [slot for slot in slots or () if slot not in hosts[name]]
        if missing:
            have = _numbers(hosts[name]) or "none"
            raise ValueError(f"{flag} {text!r}: host {name!r} has no slot {missing[0]}; its slots are {have}")
    chosen: Slots = {}
    for name, slots in hosts.items():
        listed = named.get(name, ())
        listed = slots if listed is None else listed
        kept = tuple(slot for slot in slots if (slot in listed) == bool(include))
        if kept:
            chosen[name] = kept
    if not chosen:
        raise ValueError(f"{flag} {text!r} leaves no slot on any host")
    return chosen


def limit(slots: Slots, num_nodes: int | None, num_slots: int | None) -> Slots:
    """The first `num_nodes` hosts and the first `num_slots` slots of each; None takes all.

    Raises:
        ValueError: more asked for than there is.
    """
    if num_nodes is not None and num_nodes > len(slots):
        raise ValueError(f"--num_nodes {num_nodes}, but there are {len(slots)} hosts: {', '.join(slots)}")
    limited = dict(list(slots.items())[:num_nodes])
    if num_slots is None:
        return limited
    for name, have in limited.items():
        if num_slots > len(have):
            raise ValueError(f"--num_gpus {num_slots}, but host {name!r} has {len(have)} slots")
    return {name: have[:num_slots] for name, have in limited.items()}


def visible_devices(slots: tuple[int, ...], current: str | None) -> str:
    """The CUDA_VISIBLE_DEVICES that leaves exactly `slots`, which are device numbers of the whole machine.

    Args:
        slots: the devices wanted.
        current: the variable's present value, None where it is unset. What it hides stays hidden.

    Raises:
        ValueError: a device that `current` hides, or a `current` of device names, which no slot number can be one of.
    """
    if current is None:
        return ",".join(map(str, slots))
    visible = [word.strip() for word in current.split(",") if word.strip()]
    if not all(word.isdigit() for word in visible):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={current} names devices by identifier, so slots {_numbers(slots)} cannot be found "
            "in it: unset it, or leave out --include/--exclude and use --num_gpus"
        )
    hidden = [slot for slot in slots if str(slot) not in visible]
    if hidden:
        raise ValueError(
            f"slots {_numbers(slots)} are asked for, but CUDA_VISIBLE_DEVICES={current} hides {_numbers(hidden)}: "
            "unset it, or ask for devices it shows"
        )
    return _numbers(slots)


def parse_core_list(text: str) -> tuple[int, ...]:
    """Read `0-3,8` as the cores 0, 1, 2, 3, 8.

    Raises:
        ValueError: another form, a range that runs backwards, a core named twice.
    """
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--bind_core_list {text!r}: {part!r} is neither a core nor a range FIRST-LAST")
        cores.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    if len(set(cores)) != len(cores):
        raise ValueError(f"--bind_core_list {text!r} names a core twice")
    return tuple(cores)


def split_cores(cores: tuple[int, ...], local_rank: int, num_procs: int) -> tuple[int, ...]:
    """One rank's share of the cores: equal consecutive parts, the remainder left idle.

    Raises:
        ValueError: fewer cores than ranks.
    """
    share = len(cores) // num_procs
    if share == 0:
        raise ValueError(f"{num_procs} ranks on one host cannot each have a core of {_numbers(cores)}: bind more cores")
    return cores[local_rank * share : (local_rank + 1) * share]


def _numbers(values: tuple[int, ...] | list[int]) -> str:
    return ",".join(map(str, values))
