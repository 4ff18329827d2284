"""The written reference, `docs/config-keys.md`, from the same declarations that parse and answer.

python -m tritonspeed.config.document docs/config-keys.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from tritonspeed.config.config import Config
from tritonspeed.config.keys import Spec, specs
from tritonspeed.config.optimizers import OWN_DEFAULTS, REFUSED, SCHEDULES, TORCH_DEFAULTS, TORCH_SCHEDULES
from tritonspeed.config.spelling import OLD_SHAPES

HEAD = """# Every key of a ds_config.json, and what it does here

Written by `python -m tritonspeed.config.document docs/config-keys.md` from the declarations in `tritonspeed/config/`;
a test holds this file to them. `tritonspeed check ds_config.json` answers the same for one config.

Each key is **honoured**, **mapped** from an old spelling, **inert** (accepted, with the reason why it changes nothing),
or **refused** (with the alternative). A feature that is switched off is never refused. Unknown keys are an error inside
a block and a warning at the top level, each with the nearest known name; keys that start with `_`, `//` or `#` are
comments. `null` means the default. `"auto"` means the default too, unless the table gives a rule; Hugging Face's
Trainer fills it before.
"""


def document() -> str:
    """The whole reference as Markdown."""
    known = specs(Config)
    parts = [HEAD, _table("Top level", [s for s in known.values() if not s.parents and s.block is None])]
    for path, spec in known.items():
        if spec.block is not None:
            inner = [s for s in known.values() if s.parents and s.parents[-1] is spec and s.block is None]
            names = f"`{path}`" + "".join(f" (once `{old}`)" for old in spec.key.old)
            parts.append(_table(names, inner))
    parts += [_old_shapes(), _optimizers(), _schedules()]
    return "\n".join(parts)


def _table(title: str, keys: list[Spec]) -> str:
    rows = [f"## {title}\n", "| key | type | default | unit | here |", "|---|---|---|---|---|"]
    for spec in keys:
        names = f"`{spec.name}`" + "".join(f", `{a}`" for a in spec.key.aliases)
        names += "".join(f"; once `{o}`" for o in spec.key.old)
        cells = [names, _type(spec), f"`{_value(spec.default)}`", spec.key.unit, _here(spec)]
        rows.append("| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(spec: Spec) -> str:
    return spec.type_name() + (" or null" if spec.optional else "")


def _value(value: Any) -> str:
    return "sys.maxsize" if value == sys.maxsize else json.dumps(value)


def _here(spec: Spec) -> str:
    text = spec.key.general
    if spec.key.auto:
        text += f'. "auto": {spec.key.auto}'
    reason = spec.key.inert
    if callable(reason):
        text += f". {_capital((reason.__doc__ or '').strip())}"
    elif reason is not None:
        text += f". **Inert**: {reason}"
    for rule in (spec.key.refuse, spec.key.conflict):
        if rule is not None:
            text += f". **{_capital((rule.__doc__ or '').strip())}**"
    return text


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _old_shapes() -> str:
    rows = ["## Old forms that changed shape\n", "| written | means |", "|---|---|"]
    rows += [
        f"| `{old.replace('|', chr(92) + '|')}` | `{new.replace('|', chr(92) + '|')}` |"
        for old, new in OLD_SHAPES.items()
    ]
    return "\n".join(rows) + "\n"


def _optimizers() -> str:
    rows = ["## `optimizer.type`\n", "| name | parameters and defaults, or why not |", "|---|---|"]
    rows += [f"| {name} | {_params(defaults)} |" for name, defaults in (OWN_DEFAULTS | TORCH_DEFAULTS).items()]
    rows += [f"| {name} | **Refused**: {why} |" for name, why in REFUSED.items()]
    return "\n".join(rows) + "\n"


def _schedules() -> str:
    rows = ["## `scheduler.type`\n", "| name | parameters and defaults |", "|---|---|"]
    rows += [f"| {name} | {_params(defaults)} |" for name, defaults in (SCHEDULES | TORCH_SCHEDULES).items()]
    return "\n".join(rows) + "\n"


def _params(defaults: dict[str, Any]) -> str:
    return ", ".join(f"`{name}` {json.dumps(value)}" for name, value in defaults.items())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
