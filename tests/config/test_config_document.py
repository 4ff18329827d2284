"""The written reference is the declarations."""

from pathlib import Path

from tritonspeed.config.config import Config
from tritonspeed.config.document import document
from tritonspeed.config.keys import specs

FILE = Path(__file__).parents[2] / "docs" / "config-keys.md"


def test_the_committed_reference_is_current():
    remedy = "run: python -m tritonspeed.config.document docs/config-keys.md"
    assert FILE.read_text(encoding="utf-8") == document(), remedy


def test_every_spelling_is_in_it():
    text = document()
    for path, spec in specs(Config).items():
        for name in spec.names:
            assert f"`{name}`" in text or f"`{path}`" in text, path
