"""The fifty configs of `fifty/`, and the table of what becomes of each, which a test holds to the code.

python tests/config/fifty_configs.py    writes fifty/OUTCOMES.md again, after a change that was meant
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tritonspeed.config import Answer, Config, ConfigWarning, ModelFacts, load
from tritonspeed.config.keys import specs
from tritonspeed.config.read import read

FOLDER = Path(__file__).parent / "fifty"
TABLE = FOLDER / "OUTCOMES.md"
FILES = sorted(FOLDER.glob("*.*json"))
FACTS = ModelFacts(hidden_size=64, dtype="bfloat16")
VERDICTS = ("honoured", "mapped", "inert", "refused")
OPEN = {spec.name for spec in specs(Config).values() if spec.is_open} - {"params"}
"""Blocks that are answered as one key."""

HEAD = """# What becomes of fifty configs

Written by `python tests/config/fifty_configs.py`; a test holds it to the code. Each file is resolved for the ranks
named, for a bfloat16 model of hidden size 64, as `tritonspeed check FILE --world RANKS --hidden-size 64` does. A key
that is in no list below the table is honoured or inert; no key is without an answer.

| file | ranks | stage | batch = micro × accumulation × ranks | optimizer | honoured | mapped | inert | refused |
|---|---|---|---|---|---|---|---|---|
"""


def resolved(path: Path) -> tuple[Config, int]:
    """A file's config, refused keys and all, and the number of ranks it is resolved for: 2, or what its sizes imply."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        config = load(path)
    sizes = [config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps]
    world = config.implied_world_size or (1 if sizes[0] == 1 else 2)
    return config.resolve(world, FACTS, allow_refused=True), world


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted path of every value of a config; comments have none."""
    for name, value in tree.items():
        if name.startswith("_"):
            continue
        if isinstance(value, dict) and name not in OPEN:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def rows_of(config: Config) -> list[Answer]:
    """The answers to what the file says, without those to notable defaults."""
    given = {each.spelled for each in config.origin.given} | {each.name for each in config.origin.unknown}
    return [each for each in config.answers() if each.key in given]


def table() -> str:
    """OUTCOMES.md."""
    lines, notes = [], []
    for path in FILES:
        config, world = resolved(path)
        answers = rows_of(config)
        counts = [sum(each.verdict == verdict for each in answers) for verdict in VERDICTS]
        triad = [config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps]
        batch = f"{triad[0]} = {triad[1]} × {triad[2]} × {world}"
        kind = config.optimizer.type if config.optimizer else "the program's"
        cells = [path.name, world, config.zero_optimization.stage, batch, kind, *(count or "" for count in counts)]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
        told = [each for each in answers if each.verdict in ("refused", "mapped") or "unknown key" in each.note]
        told = list({(each.key, each.note): each for each in told}.values())
        if told:
            notes += ["", f"**{path.name}**", ""]
        for each in told:
            verdict = "unknown" if each.verdict == "inert" else each.verdict
            notes.append(f"- {verdict}: `{each.key}`: {each.note}")
    return HEAD + "\n".join([*lines, *notes]) + "\n"


def for_one_rank(path: Path, folder: Path) -> dict[str, Any]:
    """A file's config as a dict, for a micro batch of 2 on one rank; what it writes goes into ``folder``.

    The length of the run is filled in, as a Trainer does; everything else that is "auto" stays.
    """
    tree = read(path)
    for name in ("train_batch_size", "gradient_accumulation_steps"):
        tree.pop(name, None)
    tree["train_micro_batch_size_per_gpu"] = 2
    schedule = tree.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = 2000
    for block in ("offload_optimizer", "offload_param"):
        zero = tree.get("zero_optimization")
        inner = zero.get(block) if isinstance(zero, dict) else None
        if isinstance(inner, dict) and inner.get("nvme_path"):
            inner["nvme_path"] = str(folder)
    for block in ("tensorboard", "csv_monitor"):
        if "output_path" in tree.get(block, {}):
            tree[block]["output_path"] = str(folder)
    return tree


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
