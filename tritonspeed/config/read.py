"""A config from where it is kept, to a plain dict: a file or text in hjson, base64 of one, or a dict.

hjson is JSON with comments, unquoted keys and trailing commas; DeepSpeed reads its configs with it. A key that
stands twice in one block is refused: parsers would silently keep the last.
"""

import base64
import binascii
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hjson

Source = str | Path | Mapping[str, Any] | None


def read(source: Source) -> dict[str, Any]:
    """The config as nested dicts, a copy that the caller's own dict does not share.

    A string is the path of a file, or the text of a config (it starts with a brace), or base64 of such a text.
    ValueError: no such file and not base64; not a config; a key that stands twice.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    if isinstance(source, Path) or _is_file(source):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"no config file at {str(path)!r}")
        return _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(source, str):
        raise ValueError(f"a config is a path, a dict or a string, not {type(source).__name__}")
    if source.lstrip().startswith("{"):
        return _parse(source, "the config text")
    return _from_base64(source)


def _is_file(source: object) -> bool:
    try:
        return isinstance(source, str) and Path(source).is_file()
    except (OSError, ValueError):  # a long base64 string is no possible file name
        return False


def _from_base64(source: str) -> dict[str, Any]:
    shown = source if len(source) <= 60 else source[:57] + "..."
    try:
        text = base64.b64decode(source.replace("-", "+").replace("_", "/"), validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise ValueError(f"config {shown!r} is neither an existing file nor base64 of a config") from None
    return _parse(text, f"the base64 config {shown!r}")


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        # JSON first: Python writes infinity as `Infinity`, which hjson would take for a string up to the line's end.
        tree = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError:
        try:
            tree = hjson.loads(text, object_pairs_hook=_unique)
        except hjson.HjsonDecodeError as error:
            raise ValueError(f"{where} is not valid JSON or hjson: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{where} holds {type(tree).__name__} where a block {{...}} of keys was expected")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    block: dict[str, Any] = {}
    for name, value in pairs:
        if name in block:
            raise ValueError(
                f"key {name!r} stands twice in one block, with {_short(block[name])} and {_short(value)}: remove one"
            )
        block[name] = value
    return block


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
