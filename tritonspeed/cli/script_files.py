"""The files of a script: itself, notebooks too, and the modules next to it that it imports. Parsed, never imported."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

NOT_OURS = {"__pycache__", "build", "dist", "node_modules", "site-packages"}
MOST_FILES = 500


@dataclass(frozen=True, eq=False)
class Source:
    """One parsed file.

    Attributes:
        path: where it is.
        tree: its code.
        text: the code as text.
        cells: first line of each cell, for a notebook.
    """

    path: Path
    tree: ast.Module
    text: str
    cells: tuple[int, ...] = ()

    def speaks_of(self, words: Iterable[str]) -> bool:
        """Whether any of the words stands in it."""
        return any(word in self.text for word in words)

    def place(self, line: int) -> str:
        """``file:line`` as a reader looks for it; in a notebook, the line of a cell."""
        if not self.cells:
            return f"{self.path.name}:{line}"
        cell = sum(first <= line for first in self.cells)
        return f"{self.path.name}[{cell}]:{line - self.cells[cell - 1] + 1}"


@dataclass
class Found:
    """What was read: the files asked for, the local modules that these import, and what could not be parsed."""

    asked: list[Source] = field(default_factory=list)
    imported: list[Source] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Source]:
        """Every file."""
        return [*self.asked, *self.imported]


def read_scripts(given: Iterable[Path]) -> Found:
    """Parse scripts, notebooks and folders of them, and follow their imports of files beside them.

    Raises:
        ValueError: a path does not exist, is of another kind, or is a folder without a script.
    """
    found, seen = Found(), set[Path]()
    for path in given:
        for each in _files_at(path):
            source = _read(each, seen, found)
            if source is not None:
                found.asked.append(source)
    waiting = [each for each in found.asked if not NOT_OURS & set(each.path.resolve().parts)]
    while waiting:
        source = waiting.pop(0)
        for path in _local_imports(source):
            if len(seen) > MOST_FILES:
                found.errors.append(f"more than {MOST_FILES} files: the rest was not read")
                return found
            other = _read(path, seen, found)
            if other is not None:
                found.imported.append(other)
                waiting.append(other)
    return found


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        inner = sorted(each for each in _walk(path) if each.suffix in (".py", ".ipynb"))
        if not inner:
            raise ValueError(f"no .py or .ipynb in the folder {str(path)!r}")
        return inner
    if not path.is_file():
        raise ValueError(f"no script at {str(path)!r}")
    if path.suffix in (".json", ".hjson"):
        raise ValueError(f"{str(path)!r} is no script: a config goes before --script")
    return [path]


def _walk(folder: Path) -> Iterator[Path]:
    for each in folder.iterdir():
        if not each.is_dir():
            yield each
        elif each.name not in NOT_OURS and not each.name.startswith(".") and not (each / "pyvenv.cfg").exists():
            yield from _walk(each)


def _read(path: Path, seen: set[Path], found: Found) -> Source | None:
    real = path.resolve()
    if real in seen:
        return None
    seen.add(real)
    try:
        text = path.read_text(encoding="utf-8")
        text, cells = _notebook(text) if path.suffix == ".ipynb" else (text, ())
        return Source(path, ast.parse(text, str(path)), text, cells)
    except SyntaxError as error:
        found.errors.append(f"{path.name}:{error.lineno}: not valid Python: {error.msg}")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        found.errors.append(f"{path.name} cannot be read: {error}")
    return None


def _notebook(text: str) -> tuple[str, tuple[int, ...]]:
    """The code cells of a notebook as one text, and the line where each begins. Commands of the shell become `pass`."""
    lines: list[str] = []
    firsts: list[int] = []
    for cell in json.loads(text)["cells"]:
        if cell.get("cell_type") != "code":
            continue
        firsts.append(len(lines) + 1)
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        foreign = source.startswith("%%")
        for line in source.splitlines() or [""]:
            code = line.lstrip()
            skip = foreign or code.startswith(("%", "!", "?")) or code.endswith("?")
            lines.append(line[: len(line) - len(code)] + "pass" if skip and not foreign else "" if foreign else line)
    return "\n".join(lines) + "\n", tuple(firsts)


def _local_imports(source: Source) -> Iterator[Path]:
    """Files that an import of this one finds beside it, or in the packages it is in."""
    here = source.path.resolve().parent
    roots = [here]
    while (roots[-1] / "__init__.py").exists():
        roots.append(roots[-1].parent)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(roots, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            base = [here.joinpath(*[".."] * (node.level - 1)).resolve()] if node.level else roots
            yield from _module(base, parts)
            for alias in node.names:
                yield from _module(base, [*parts, alias.name])


def _module(roots: list[Path], parts: list[str]) -> Iterator[Path]:
    """The file of a module and of the packages it is in, under the first root that has it; not installed ones."""
    for root in roots:
        place = root.joinpath(*parts)
        files = [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
        found = [each for each in (*files, place.with_suffix(".py")) if parts and each.is_file()]
        if found and root.name not in NOT_OURS:
            yield from found
            return
