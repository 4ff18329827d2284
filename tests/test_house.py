"""The laws of the house that neither ruff nor import-linter can hold; each rule is also shown to bite on a bad line."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tritonspeed"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = {"kernels": 120, "": 60}  # signature and code, without the docstring
MAX_UNDOCUMENTED_METHOD_LINES = 5  # one that shows what it does at a glance, or overrides one that is documented

MAY_IMPORT_TORCH_DISTRIBUTED = {
    "cli/launch.py": "starts torch's own launcher, torch.distributed.run",
    "cli/report.py": "says which backends this build of torch has",
}

Functions = (ast.FunctionDef, ast.AsyncFunctionDef)
Violation = tuple[int, str]
Rule = Callable[[ast.Module, str], Iterator[Violation]]


def imports_torch_distributed(tree: ast.Module, place: str) -> Iterator[Violation]:
    """Only comm/ knows process groups. Samplers are data, not communication."""
    if place.startswith("comm/") or place in MAY_IMPORT_TORCH_DISTRIBUTED:
        return
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        if any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in names):
            yield node.lineno, "torch.distributed belongs to comm/: add what is needed there"


def reads_environment(tree: ast.Module, place: str) -> Iterator[Violation]:
    """What a run depends on is in its config, or in what a launcher tells comm/. integrations/ meets other programs."""
    if place.startswith(("comm/", "cli/", "integrations/")):
        return
    for node in ast.walk(tree):
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")) or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and any("env" in alias.name for alias in node.names)
        ):
            yield node.lineno, "an environment variable is read outside comm/ and cli/: make it an argument"


def prints(tree: ast.Module, place: str) -> Iterator[Violation]:
    """Facts of a run are in StepReport and the log; only the command line prints."""
    if place.startswith("cli/"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
            yield node.lineno, "printed outside cli/: return it, or log it"


def compares_stages(tree: ast.Module, place: str) -> Iterator[Violation]:
    """What a stage shards is asked of its row in zero/stages.py.

    config/ stands below zero/ and speaks of stage numbers as the values of a key, which they are there.
    """
    if place == "zero/stages.py" or place.startswith("config/"):
        return
    for node in ast.walk(tree):
        subjects = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(n, ast.Constant) and type(n.value) is int for side in sides for n in ast.walk(side)):
                subjects = sides
        elif isinstance(node, ast.Match):
            subjects = [node.subject]
        if any(re.search(r"(^|[._])stage(\.number)?$", ast.unparse(side)) for side in subjects):
            yield node.lineno, "a stage number is compared: ask stages.py what the stage shards"


def lacks_docstrings(tree: ast.Module, place: str) -> Iterator[Violation]:
    """Public modules, classes and functions say what they are; short methods and forwards may show it."""
    if ast.get_docstring(tree) is None and place.rsplit("/", 1)[-1] not in ("__main__.py", "version.py"):
        yield 1, "the module has no docstring"
    for node in tree.body:
        if not isinstance(node, (*Functions, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.lineno, f"{node.name} has no docstring"
        methods = [n for n in node.body if isinstance(n, Functions)] if isinstance(node, ast.ClassDef) else []
        for method in methods:
            is_long = code_lines(method) > MAX_UNDOCUMENTED_METHOD_LINES
            is_public = not method.name.startswith("_") and method.name != "forward"
            if is_long and is_public and ast.get_docstring(method) is None:
                yield method.lineno, f"{node.name}.{method.name} has no docstring"


def asserts_without_message(tree: ast.Module, place: str) -> Iterator[Violation]:
    """An assert is for our own mistakes, and says which."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield node.lineno, "assert without a message"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    return num_lines(function) - (num_lines(docstring) if docstring else 0)


def num_lines(node: ast.stmt) -> int:
    """Lines that a statement spans."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def is_too_long(tree: ast.Module, place: str) -> Iterator[Violation]:
    """A file is read in one sitting, a function on one screen."""
    limit = MAX_FUNCTION_LINES["kernels" if place.startswith("kernels/") else ""]
    for node in ast.walk(tree):
        if isinstance(node, Functions) and (length := code_lines(node)) > limit:
            yield node.lineno, f"{node.name} has {length} lines, more than {limit}"
    if tree.body and (last := tree.body[-1].end_lineno or 0) > MAX_FILE_LINES:
        yield last, f"the file has {last} lines, more than {MAX_FILE_LINES}"


def defers_work(tree: ast.Module, place: str) -> Iterator[Violation]:
    """What is to be done is in the issues, not in comments."""
    for number, line in enumerate((PACKAGE / place).read_text().splitlines() if place else SAMPLE_TODO.splitlines(), 1):
        if re.search(r"#.*\b(TODO|FIXME|XXX)\b", line):
            yield number, "a comment defers work"


SAMPLE_TODO = "x = 1  # " + "TODO: later"
BITES: dict[Rule, list[str]] = {
    imports_torch_distributed: [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import x",
        "def f():\n    return torch.distributed.get_rank()",
    ],
    reads_environment: ["import os\nx = os.environ['A']", "from os import getenv", "os.getenv('A')"],
    prints: ["print(1)", "sys.stdout.write('a')"],
    compares_stages: [
        "if stage == 3: pass",
        "if self.stage.number >= 2: pass",
        "config.zero_optimization.stage in (1, 2)",
        "match zero.stage:\n    case 3: pass",
    ],
    lacks_docstrings: [
        "x = 1",
        '"""A."""\ndef f(): pass',
        '"""A."""\nclass C: pass',
        '"""A."""\nclass C:\n    """C."""\n    def f(self):\n' + "        x = 1\n" * 6,
    ],
    asserts_without_message: ["assert x"],
    is_too_long: ["def f():\n" + "    x = 1\n" * 60, "\n" * MAX_FILE_LINES + "x = 1"],
    defers_work: [SAMPLE_TODO],
}
FINE: dict[Rule, list[str]] = {
    imports_torch_distributed: ["from torch.utils.data.distributed import DistributedSampler", "from a import comm"],
    reads_environment: ["environment = {}"],
    prints: ["table.print(1)", "log.info('a')"],
    compares_stages: ["if stage.shards_gradients: pass", "if num_stages == 3: pass", "stages[stage] == other"],
    is_too_long: ['def f():\n    """' + "a\n" * 70 + '"""\n    return 1'],
}


@pytest.mark.parametrize("rule", BITES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule):
    found = []
    for path in FILES:
        place = path.relative_to(PACKAGE).as_posix()
        found += [f"tritonspeed/{place}:{line}: {what}" for line, what in rule(ast.parse(path.read_text()), place)]
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


@pytest.mark.parametrize(("rule", "code"), [(rule, code) for rule in BITES for code in BITES[rule]])
def test_the_rule_bites(rule, code):
    assert list(rule(ast.parse(code), "")), code


@pytest.mark.parametrize(("rule", "code"), [(rule, code) for rule in FINE for code in FINE[rule]])
def test_the_rule_lets_pass(rule, code):
    assert not list(rule(ast.parse(code), "")), code


@pytest.mark.parametrize("place", MAY_IMPORT_TORCH_DISTRIBUTED)
def test_an_exception_that_nobody_needs_is_taken_back(place):
    assert list(imports_torch_distributed(ast.parse((PACKAGE / place).read_text()), "elsewhere.py"))


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_or_its_config_imports_no_torch():
    program = "import sys, tritonspeed, tritonspeed.config, tritonspeed.cli.check\n"
    assert run(program + "print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])").strip() == "[]"


def test_importing_everything_starts_no_device():
    paths = [path for path in FILES if path.parent.parent.name != "path"]  # what stands there is imported as deepspeed
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    program = f"import importlib, torch\nfor name in {modules}: importlib.import_module(name)\n"
    assert run(program + "print(torch.cuda.is_initialized(), torch.distributed.is_initialized())") == "False False\n"


def test_every_public_name_of_the_package_is_there():
    assert run("import tritonspeed as ts\nfor name in ts.__all__: getattr(ts, name)\nprint('ok')") == "ok\n"


PATH = re.compile(r"`((?:tritonspeed|tests|bench|docs|examples|notebooks)/[\w./-]+)`|\]\((?!https?:|#)([^)#\s]+)[)#]")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_points_to_exists(page):
    missing = []
    for from_root, from_page in PATH.findall(page.read_text()):
        target = ROOT / from_root if from_root else page.parent / from_page
        if not target.exists():
            missing.append(from_root or from_page)
    assert not missing
