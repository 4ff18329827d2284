"""The written reference of names is the table."""

from __future__ import annotations

from pathlib import Path

from tritonspeed.integrations.document import document
from tritonspeed.integrations.names import MODULES, REASONS

FILE = Path(__file__).parents[2] / "docs" / "deepspeed-names.md"


def test_the_committed_reference_is_current() -> None:
    remedy = "run: python -m tritonspeed.integrations.document docs/deepspeed-names.md"
    assert FILE.read_text(encoding="utf-8") == document(), remedy


def test_every_name_and_every_reason_is_in_it() -> None:
    text = document()
    assert not [name for rows in MODULES.values() for name in rows if f"`{name}`" not in text]
    assert not [module for module in MODULES if f"`{module}`" not in text]
    assert not [module for module in REASONS if f"`{module}" not in text]
