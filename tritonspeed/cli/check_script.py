"""`tritonspeed check --script train.py`: what becomes of each name of ``deepspeed`` that a script uses.

Nothing is imported and nothing runs: the script and the files beside it that it imports are parsed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tritonspeed.cli.engine_members import ALTERNATIVES, PLAUSIBLE, members_here
from tritonspeed.cli.neighbours import Neighbour, neighbours
from tritonspeed.cli.script_files import Found, Source, read_scripts
from tritonspeed.cli.script_uses import Reader, Use
from tritonspeed.config import Config, ConfigWarning, load
from tritonspeed.config.batch import NAMES as BATCH_SIZES
from tritonspeed.integrations import names

Verdict = Literal["refused", "warning", "inert", "honoured"]
ORDER: tuple[Verdict, ...] = ("refused", "warning", "inert", "honoured")
FRAMEWORKS = ("transformers", "accelerate", "trl", "peft", "lightning", "pytorch_lightning")
NEEDS_FACADE = (*FRAMEWORKS, "deepspeed")
WORDS = (
    "deepspeed",
    "DeepSpeed",
    "DS_",
    ".ds_",
    "tritonspeed",
    "CUDA_HOME",
    "TORCH_EXTENSIONS",
    "ds_report",
    *FRAMEWORKS,
)
"""A file with none of these in it is passed over."""
BUILDS = "nothing is compiled from C++ or CUDA: there is no build to steer"
ENVIRONMENT = {
    "DS_ACCELERATOR": "the device is torch's GPU where there is one, else the CPU",
    "DS_SKIP_CUDA_CHECK": BUILDS,
    "DS_IGNORE_CUDA_DETECTION": BUILDS,
    "TORCH_EXTENSIONS_DIR": BUILDS,
    "CUDA_HOME": BUILDS,
    "MAX_JOBS": BUILDS,
}
"""Variables that mean something to DeepSpeed; every DS_BUILD_... too."""
COMMANDS: dict[str, tuple[Verdict, str]] = {
    "deepspeed": ("honoured", "started by `tritonspeed run`, `deepspeed` is the same launcher under its old name"),
    "ds_report": ("warning", "use `tritonspeed report`"),
    "ds_bench": ("warning", "use torch's or NCCL's own tests of collectives"),
    "ds_io": ("warning", "use `tritonspeed estimate --calibrate`, which times the disk too"),
}
REFUSED_ARGUMENTS = {"mesh_param": "there is one mesh axis: leave it out"}
OLD_PLACE = "transformers {} has no transformers.deepspeed: import it from transformers.integrations"
KEEP = "at stage 3, from_pretrained builds the model sharded for as long as this object lives"


@dataclass
class Row:
    """One name and what becomes of it, wherever it is used."""

    name: str
    verdict: Verdict
    note: str
    places: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ScriptReport:
    """What a script does, and how to start it.

    Attributes:
        rows: refused names first.
        asked, imported: the files that were read: those named, and those that they import.
        errors: files that could not be parsed.
        start: how to start it under tritonspeed; "" where nothing is needed.
    """

    rows: list[Row]
    asked: list[str]
    imported: list[str]
    errors: list[str]
    start: str

    @property
    def fails(self) -> bool:
        """Whether the script cannot run as it stands."""
        return bool(self.errors) or any(row.verdict == "refused" for row in self.rows)


def check_scripts(given: Iterable[Path]) -> ScriptReport:
    """Read scripts, notebooks or folders, and say what becomes of what they use.

    Raises:
        ValueError: a path does not exist, or is no script.
    """
    found = read_scripts(given)
    rows: dict[tuple[str, Verdict, str], Row] = {}
    uses: dict[Source, list[Use]] = {}
    for source in found.all:
        if not source.speaks_of(WORDS):
            continue
        try:
            uses[source] = Reader(source).uses
        except RecursionError:
            found.errors.append(f"{source.path.name}: nested too deeply to be read")
    known = _Known(use for each in uses.values() for use in each if use.kind == "name")
    for source, each in uses.items():
        for use in sorted(each, key=lambda use: use.line):
            for row in _judge(use, source, known):
                made = rows.setdefault((row.name, row.verdict, row.note), row)
                place = source.place(use.line)
                if place not in made.places:
                    made.places.append(place)
    start, launch = _launch(found, uses)
    ordered = sorted([*rows.values(), *launch], key=lambda row: ORDER.index(row.verdict))
    asked, imported = ([each.path.name for each in part] for part in (found.asked, found.imported))
    return ScriptReport(ordered, asked, imported, found.errors, start)


class _Known:
    """What all uses of a name together say: that some are more than a question, that its import may fail."""

    def __init__(self, uses: Iterable[Use]) -> None:
        self.needed, self.optional = set[str](), set[str]()
        for use in uses:
            place = _object(use.name)[0]
            if use.needed and not use.guarded:
                self.needed.add(place)
            if use.guarded:
                self.optional.add(place)


def _judge(use: Use, source: Source, known: _Known) -> Iterator[Row]:
    if use.kind == "name":
        row = _name(use, known)
        if row is not None:
            yield row
    elif use.kind in ALTERNATIVES:
        yield from _member(use)
    elif use.kind == "argument" and use.name in REFUSED_ARGUMENTS:
        yield Row(f"initialize({use.name}=...)", "refused", REFUSED_ARGUMENTS[use.name])
    elif use.kind == "config":
        yield _config(use, source)
    elif use.kind == "environment" and (use.name in ENVIRONMENT or use.name.startswith("DS_BUILD_")):
        yield Row(f"environment {use.name}", "inert", ENVIRONMENT.get(use.name, BUILDS))
    elif use.kind == "command" and use.name in COMMANDS:
        verdict, note = COMMANDS[use.name]
        yield Row(f"command {use.name}", verdict, note)
    elif use.kind == "import":
        yield from _framework(use)


def _name(use: Use, known: _Known) -> Row | None:
    """What the table says of a name of deepspeed; nothing of a module alone that is there."""
    place, is_module = _object(use.name)
    if is_module:
        return None
    row = names.look_up(place)
    if row.verdict != "refused":
        return Row(place, row.verdict, row.note)
    module, _, name = place.rpartition(".")
    if name in names.MODULES.get(module, {}):  # it can be imported, and is an error when called
        fails, why = place in known.needed, "may be imported, but not called"
    else:
        fails, why = place not in known.optional, "the script goes on without it"
    return Row(place, "refused", row.note) if fails else Row(place, "inert", f"{why}: {row.note}")


def _object(whole: str) -> tuple[str, bool]:
    """The object of deepspeed that a name begins with, without what it is asked for; and whether it is a module."""
    place = "deepspeed"
    for part in whole.split(".")[1:]:
        inner = f"{place}.{part}"
        if inner not in names.MODULES:
            return inner, False
        place = inner
    return place, True


def _member(use: Use) -> Iterator[Row]:
    here = members_here(use.kind)
    instead = ALTERNATIVES[use.kind].get(use.name)
    if use.name in here:
        yield Row(f"{use.kind}.{use.name}", "honoured", "")
    elif instead is not None and use.name in PLAUSIBLE:
        note = f"the module's own, where it has one; DeepSpeed's is not provided: {instead}"
        yield Row(f"{use.kind}.{use.name}", "warning", note)
    elif instead is not None:
        yield Row(f"{use.kind}.{use.name}", "inert" if use.guarded else "refused", f"not provided: {instead}")


def _config(use: Use, source: Source) -> Row:
    name, given = f"config {use.name}", use.value
    if isinstance(given, str):
        folders = (source.path.parent, Path.cwd())
        path = next((folder / given for folder in folders if (folder / given).is_file()), None)
        if path is None:
            return Row(name, "warning", "not found from here: run `tritonspeed check` on it where it is")
        given = path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConfigWarning)
            config = load(given)
        return _config_row(name, config)
    except ValueError as error:
        return Row(name, "refused", str(error))


def _config_row(name: str, config: Config) -> Row:
    given = any(getattr(config, size) is not None for size in BATCH_SIZES)
    problem = ""
    try:
        config = config.resolve(config.implied_world_size or 1, allow_refused=True)
    except ValueError as error:
        problem = str(error) if given else ""  # without any size, the program gives them later
    answers = config.answers()
    refused = [f"{each.key}: {each.note}" for each in answers if each.verdict == "refused"]
    if refused or problem:
        return Row(name, "refused" if refused else "warning", "; ".join([*refused, *filter(None, [problem])]))
    told = [each for each in answers if each.given is not None]
    counts = {verdict: sum(each.verdict == verdict for each in told) for verdict in ("honoured", "mapped", "inert")}
    return Row(name, "honoured", "keys: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count))


def _framework(use: Use) -> Iterator[Row]:
    top = use.name.split(".")[0]
    if top in FRAMEWORKS:
        yield _installed(top, use.guarded)
    reads = use.name.rpartition(".")[2] in ("HfDeepSpeedConfig", "HfTrainerDeepSpeedConfig")
    if top == "transformers" and (reads or _is_old(use.name)):
        version = _neighbours()["transformers"].version
        gone = _is_old(use.name) and version is not None and not version.startswith("4.")
        note = OLD_PLACE.format(version) if gone else KEEP
        if gone or reads:
            yield Row(use.name, "warning" if gone and not use.guarded else "inert" if gone else "honoured", note)


def _is_old(name: str) -> bool:
    return f"{name}.".startswith("transformers.deepspeed.")


@functools.cache
def _neighbours() -> dict[str, Neighbour]:
    return {each.name: each for each in neighbours()}


def _installed(name: str, guarded: bool) -> Row:
    """A framework: its version here, and whether it is one that was tried."""
    found = _neighbours()[name.replace("_", "-")]
    if found.version is None:
        return Row(name, "inert" if guarded else "warning", f"imported, and not installed here; {found.says}")
    return Row(name, "honoured" if found.fits == "tried" else "warning", f"{found.version}: {found.fits}, {found.says}")


def _launch(found: Found, uses: dict[Source, list[Use]]) -> tuple[str, list[Row]]:
    """How to start it, and what is wrong with where ``import tritonspeed.hf`` stands."""
    rows, has_line, needs = [], False, False
    for source, each in uses.items():
        lines = [use.line for use in each if use.kind == "import" and use.name == "tritonspeed.hf"]
        others = [use for use in each if use.kind == "import" and use.name.split(".")[0] in NEEDS_FACADE]
        first = min(others, key=lambda use: use.line, default=None)
        needs = needs or first is not None
        has_line = has_line or bool(lines)
        if lines and source in found.imported:
            note = "must be the first line of the script itself, before anything imports what needs it"
            rows.append(Row("import tritonspeed.hf", "warning", note, [source.place(min(lines))]))
        elif lines and first is not None and first.line < min(lines):
            top = first.name.split(".")[0]
            note = f"comes after {top} on line {first.line}, which has looked for deepspeed by then: make it the first"
            rows.append(Row("import tritonspeed.hf", "refused", note, [source.place(min(lines))]))
    script = next((each.path for each in found.asked if each.path.suffix == ".py"), None)
    if has_line or not needs or script is None:
        return "", rows
    shown = script.name if len(found.asked) == 1 else "SCRIPT.py"
    return f"start it with `tritonspeed run {shown}`, or make `import tritonspeed.hf` its first line", rows
