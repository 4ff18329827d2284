"""The table: every name of DeepSpeed's surface that means something here, and what stands behind it.

A row is an alias (``here``: a native object of the same contract), an alias that needs a word (``inert``: accepted, and
why it changes nothing), or a refusal (``refused``: importable, an error at its first use, with the alternative). The
rows stand in ``table/``; here they are looked up. Without torch: ``tritonspeed check --script`` reads them too, and
docs/deepspeed-names.md is made of them.
"""

from __future__ import annotations

from tritonspeed.integrations.facts import EMULATED, VERSION
from tritonspeed.integrations.table import MODULES, REASONS, Name, Verdict
from tritonspeed.integrations.table.rows import here, inert, refused

__all__ = [
    "EMULATED",
    "MODULES",
    "REASONS",
    "VERSION",
    "Name",
    "Verdict",
    "children",
    "here",
    "inert",
    "look_up",
    "reason",
    "refused",
]


def reason(place: str) -> str:
    """Why ``place``, which the table has not, is not provided."""
    return next((REASONS[p] for p in _prefixes(place) if p in REASONS), REASONS["deepspeed"])


def look_up(place: str) -> Name:
    """The row of a name or module, in full; a refusal where the table has none.

    What belongs to an object of the table, as ``deepspeed.DeepSpeedEngine.backward``, has the object's row.
    """
    for prefix in _prefixes(place):
        if prefix in MODULES:
            return Name(place, "honoured") if prefix == place else refused(reason(place))
        module, _, attribute = prefix.rpartition(".")
        row = MODULES.get(module, {}).get(attribute)
        if row is not None:
            return row
    return refused(reason(place))


def children(module: str) -> list[str]:
    """Names and submodules of a module of the table, sorted."""
    inner = {name[len(module) + 1 :].partition(".")[0] for name in MODULES if name.startswith(module + ".")}
    return sorted(inner | set(MODULES[module]))


def _prefixes(place: str) -> list[str]:
    parts = place.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
