"""The written reference, `docs/deepspeed-names.md`, from the table that answers.

python -m tritonspeed.integrations.document docs/deepspeed-names.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from tritonspeed.integrations.facts import EMULATED
from tritonspeed.integrations.names import MODULES, REASONS
from tritonspeed.integrations.table import Name, Rows

HEAD = f"""# Every name of DeepSpeed, and what it is here

Written by `python -m tritonspeed.integrations.document docs/deepspeed-names.md` from `tritonspeed/integrations/table/`;
a test holds this file to it, and the table to every public name of DeepSpeed {EMULATED}. `tritonspeed check
ds_config.json --script train.py` looks up the names that one script uses.

A name is **an alias** of a native object with the same contract, **inert** (accepted, with the reason why it changes
nothing), or **refused**: it can be imported and is good for `isinstance`; a call, a subclass's call, or an attribute
raises NotImplementedError, which names it and what to do instead. A module that is not listed raises
ModuleNotFoundError, with the reason at the end of this page.
"""


def document() -> str:
    """The whole reference as Markdown."""
    listed: dict[int, str] = {}
    parts = [HEAD]
    for module, rows in sorted(MODULES.items()):
        if rows and id(rows) in listed:  # the same names under two modules
            parts.append(f"## `{module}`\n\nThe names of `{listed[id(rows)]}`.\n")
        elif rows:
            listed[id(rows)] = module
            parts.append(_section(module, rows))
    packages = ", ".join(f"`{module}`" for module, rows in sorted(MODULES.items()) if not rows)
    parts.append(f"## Packages that hold modules alone\n\n{packages}\n")
    parts.append(_modules_without())
    return "\n".join(parts)


def _section(module: str, rows: Rows) -> str:
    lines = [f"## `{module}`\n"]
    provided = [f"| `{name}` | {_here(row)} |" for name, row in sorted(rows.items()) if row.target is not None]
    if provided:
        lines += ["| name | here |", "|---|---|", *provided, ""]
    by_reason: dict[str, list[str]] = {}
    for name, row in sorted(rows.items()):
        if row.target is None:
            by_reason.setdefault(row.note, []).append(f"`{name}`")
    if by_reason:
        lines += [f"- **Refused**: {_cell(why)}\n  {', '.join(names)}" for why, names in by_reason.items()]
        lines.append("")
    return "\n".join(lines)


def _here(row: Name) -> str:
    assert row.target is not None, "refused rows have no target"
    text = f"`{row.target.replace(':', '.')}`" if row.verdict == "honoured" else "**Inert**"
    return f"{text}: {_cell(row.note)}" if row.note else text


def _modules_without() -> str:
    rows = ["## Modules that are refused\n", "With all that is below them, unless it stands above.\n"]
    rows += ["| module | why, and what instead |", "|---|---|"]
    rows += [f"| `{module}.*` | {_cell(why)} |" for module, why in sorted(REASONS.items()) if module != "deepspeed"]
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
