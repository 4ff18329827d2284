"""What a parsed script does with ``deepspeed``: names it imports and uses, members of its engines, configs it names.

One file at a time and without running it, so a name is followed through imports, plain assignments and ``getattr`` with
a constant, not through functions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tritonspeed.cli.script_files import Source

Kind = Literal["name", "engine", "optimizer", "parameter", "import", "config", "environment", "command", "argument"]
ENGINES = {"engine", "model_engine", "ds_engine", "deepspeed_engine"}
"""Names that people give an engine which came from another function."""
RETURNED: tuple[Kind, ...] = ("engine", "optimizer")
CONFIG_ARGUMENTS = {"config", "config_params", "config_dict_or_path", "config_file_or_dict", "hf_ds_config"}
CONFIG_READERS = ("HfDeepSpeedConfig", "HfTrainerDeepSpeedConfig", "DeepSpeedPlugin")
GUARDS = {"ImportError", "ModuleNotFoundError", "AttributeError", "NotImplementedError", "Exception", "BaseException"}


@dataclass(frozen=True)
class Use:
    """One thing that a line does.

    Attributes:
        kind: a name of deepspeed; a member of an engine, of its optimizer or of a sharded parameter; a module imported
            at all; a config; an environment variable that is set; a command that is started; an argument of
            ``initialize``.
        name: the name, in full.
        line: where.
        needed: used for more than ``isinstance``, an annotation or an import.
        guarded: inside ``try`` with a handler for what is missing, or with a default.
        value: a config's path or dict.
    """

    kind: Kind
    name: str
    line: int
    needed: bool = True
    guarded: bool = False
    value: Any = None


class Reader:
    """Reads one file: ``uses`` is the outcome."""

    def __init__(self, source: Source) -> None:
        self.tree = source.tree
        nodes = list(ast.walk(self.tree))
        self.parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        self.bound: dict[str, str] = {}
        """Name in the file → name of deepspeed (or of os, subprocess, importlib) that it stands for."""
        self.members: dict[str, Kind] = {}
        """Expression → that it is an engine, or an engine's optimizer."""
        self.since: dict[tuple[str, ast.AST | None], int] = {}
        """Where ``initialize`` gives a name to an engine: before that line, the name is another object's."""
        self.literals: dict[str, Any] = {}
        self.uses: list[Use] = []
        for node in nodes:
            self._import(node)
        bindings = [node for node in nodes if isinstance(node, ast.Assign | ast.AnnAssign | ast.arg)]
        for _ in range(3):  # an alias of an alias of an alias
            for node in bindings:
                self._assign(node)
        if any(name.split(".")[0] == "deepspeed" for name in self.bound.values()):
            for name in ENGINES:
                self.members.setdefault(name, "engine")
        for node in nodes:
            self._name(node)
            self._call(node)
            self._environment(node)

    def place(self, node: ast.AST) -> str | None:
        """The name in full that an expression stands for, where it is one of what was imported."""
        if isinstance(node, ast.Name):
            return self.bound.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.place(node.value)
            return None if base is None else f"{base}.{node.attr}"
        if isinstance(node, ast.Call):
            return self._place_of_call(node)
        return None

    def _place_of_call(self, node: ast.Call) -> str | None:
        """What ``getattr`` and ``import_module`` with constants give."""
        function = node.func.id if isinstance(node.func, ast.Name) else self.place(node.func)
        function = self.bound.get(function or "", function)
        texts = [each.value if isinstance(each, ast.Constant) else None for each in node.args]
        if function == "getattr" and len(texts) > 1 and isinstance(texts[1], str):
            base = self.place(node.args[0])
            return None if base is None else f"{base}.{texts[1]}"
        if function in ("importlib.import_module", "__import__") and texts and isinstance(texts[0], str):
            return texts[0].split(".")[0] if function == "__import__" else texts[0]
        return None

    def _import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                self.bound[alias.asname or top] = alias.name if alias.asname else top
                self._add("import", alias.name, node, needed=False)
                if top == "deepspeed" and alias.name != top:
                    self._add("name", alias.name, node, needed=True)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = node.module if alias.name == "*" else f"{node.module}.{alias.name}"
                self._add("import", whole, node, needed=False)
                if alias.name != "*":
                    self.bound[alias.asname or alias.name] = whole
                if node.module.split(".")[0] == "deepspeed":
                    self._add("name", whole, node, needed=False)

    def _assign(self, node: ast.AST) -> None:
        if isinstance(node, ast.arg) and node.annotation is not None:
            if (self.place(node.annotation) or "").endswith(".DeepSpeedEngine"):
                self.members[node.arg] = "engine"
            return
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign_one(node.target, node.value)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign_one(target, node.value)

    def _assign_one(self, target: ast.expr, value: ast.expr) -> None:
        whole = self.place(value)
        key = _dotted(target) or ""
        if isinstance(target, ast.Name) and whole is not None:
            self.bound.setdefault(target.id, whole)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant | ast.Dict):
            self.literals.setdefault(target.id, value)
        if self._is_initialize(value):
            names = target.elts if isinstance(target, ast.Tuple | ast.List) else []
            for each, kind in zip(names, RETURNED, strict=False):
                self._is_member(_dotted(each) or "_", kind, value)
        elif isinstance(value, ast.Subscript) and self._is_initialize(value.value):
            index = value.slice.value if isinstance(value.slice, ast.Constant) else None
            if index in (0, 1):
                self._is_member(key, RETURNED[index], value)
        elif key and (kind := self.members.get(_dotted(value) or "")) is not None:
            self.members.setdefault(key, kind)

    def _is_member(self, key: str, kind: Kind, value: ast.expr) -> None:
        if key != "_":
            self.members[key] = kind
            at = (key, self._scope(value))
            self.since[at] = min(value.lineno, self.since.get(at, value.lineno))

    def _scope(self, node: ast.AST | None) -> ast.AST | None:
        """The function that a node is in."""
        while node is not None and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node = self.parents.get(node)
        return node

    def _is_initialize(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and self.place(node.func) in (
            "deepspeed.initialize",
            "tritonspeed.initialize",
        )

    def _name(self, node: ast.AST) -> None:
        parent = self.parents.get(node)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and self.members:
            key = _dotted(node.value) or ""
            kind = self.members.get(key)
            if kind is not None and node.lineno >= self.since.get((key, self._scope(node)), 0):
                self._add(kind, node.attr, node)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr.startswith("ds_"):
            self._add("parameter", node.attr, node)
        if isinstance(parent, ast.Attribute) and parent.value is node:
            return  # the longer name is looked at
        is_getattr = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
        if not isinstance(node, ast.Name | ast.Attribute) and not is_getattr:
            return
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return
        whole = self.place(node)
        if whole is not None and whole.startswith("deepspeed."):
            default = is_getattr and isinstance(node, ast.Call) and len(node.args) > 2
            self._add("name", whole, node, needed=self._is_needed(node), guarded=default)

    def _is_needed(self, node: ast.AST) -> bool:
        """Not only asked what it is: in ``isinstance``, an annotation, an ``except``, or bound to another name."""
        child, parent = node, self.parents.get(node)
        while parent is not None and not isinstance(parent, ast.stmt | ast.arg):
            if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
                if parent.func.id in ("isinstance", "issubclass") and child in parent.args[1:]:
                    return False
                if parent.func.id == "hasattr":
                    return False
            if isinstance(parent, ast.ExceptHandler):
                return False
            child, parent = parent, self.parents.get(parent)
        if isinstance(parent, ast.arg | ast.AnnAssign) and parent.annotation is child:
            return False
        if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef) and parent.returns is child:
            return False
        return not (isinstance(parent, ast.Assign) and parent.value is child and self.place(child) is not None)

    def _call(self, node: ast.AST) -> None:
        if not isinstance(node, ast.Call):
            return
        whole = self.place(node.func) or ""
        short = (whole or _dotted(node.func) or "").rpartition(".")[2]
        if whole == "deepspeed.initialize":
            for each in node.keywords:
                given = not (isinstance(each.value, ast.Constant) and each.value.value is None)
                if each.arg is not None and given:
                    self._add("argument", each.arg, node)
        for each in node.keywords:
            if (each.arg == "deepspeed" and short.endswith(("Arguments", "Config", "Args"))) or (
                each.arg in CONFIG_ARGUMENTS and (whole.startswith("deepspeed.") or short in CONFIG_READERS)
            ):
                self._config(each.value, node)
        if short in CONFIG_READERS[:2] and node.args:
            self._config(node.args[0], node)
        if whole.startswith("subprocess.") or whole in ("os.system", "os.popen"):
            self._command(node)

    def _config(self, value: ast.expr, node: ast.AST) -> None:
        if isinstance(value, ast.Name):
            value = self.literals.get(value.id, value)
        try:
            given = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return  # made by the program: there is nothing to read yet
        if isinstance(given, dict) or (isinstance(given, str) and given):
            self._add("config", given if isinstance(given, str) else "{...}", node, value=given)

    def _command(self, node: ast.Call) -> None:
        first = node.args[0] if node.args else None
        word = first.elts[0] if isinstance(first, ast.List | ast.Tuple) and first.elts else first
        if isinstance(word, ast.JoinedStr) and word.values:
            word = word.values[0]
        if isinstance(word, ast.Constant) and isinstance(word.value, str):
            self._add("command", (word.value.split() or [""])[0], node)

    def _environment(self, node: ast.AST) -> None:
        named: list[ast.expr | None] = []
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            named = [node.slice] if self.place(node.value) == "os.environ" else []
        elif isinstance(node, ast.Call):
            whole = self.place(node.func) or ""
            if whole in ("os.environ.setdefault", "os.putenv") and node.args:
                named = [node.args[0]]
            elif whole == "os.environ.update":
                named = [key for each in node.args if isinstance(each, ast.Dict) for key in each.keys]
                named += [ast.Constant(each.arg) for each in node.keywords if each.arg]
        for each in named:
            if isinstance(each, ast.Constant) and isinstance(each.value, str):
                self._add("environment", each.value, node)

    def _add(self, kind: Kind, name: str, node: ast.AST, **more: Any) -> None:
        line = getattr(node, "lineno", 1)
        guarded = more.pop("guarded", False) or any(self._guards(node))
        self.uses.append(Use(kind, name, line, guarded=guarded, **more))

    def _guards(self, node: ast.AST) -> Iterator[bool]:
        child, parent = node, self.parents.get(node)
        while parent is not None:
            if isinstance(parent, ast.Try) and child in parent.body:
                yield any(_catches(handler.type) for handler in parent.handlers)
            if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                return  # whoever calls it may not catch anything
            child, parent = parent, self.parents.get(parent)


def _dotted(node: ast.AST) -> str | None:
    """The text of a name with dots."""
    if isinstance(node, ast.Name):
        return node.id
    base = _dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{base}.{node.attr}" if base is not None and isinstance(node, ast.Attribute) else None


def _catches(handler: ast.expr | None) -> bool:
    if handler is None:
        return True
    each = handler.elts if isinstance(handler, ast.Tuple) else [handler]
    return any((_dotted(one) or "").rpartition(".")[2] in GUARDS for one in each)
