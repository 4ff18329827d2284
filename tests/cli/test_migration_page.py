"""docs/migration.md: its commands run, the output that it shows is printed, its old spellings mean what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tritonspeed.cli import check, main
from tritonspeed.config import load
from tritonspeed.config.keys import value_at

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
WIDTH = 118
SPELLINGS = re.findall(r"^\| `(\{.*\})` \| `([\w.]+)` \| `(.*)` \|$", PAGE, flags=re.MULTILINE)


def block(language):
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return text


def printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "WIDTH_OF_A_PIPE", WIDTH)
    (tmp_path / "train.py").write_text(block("python"))
    (tmp_path / "zero3.json").write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 3}}))
    status = main(["check", "--script", "train.py"])
    return status, "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"


def test_the_output_on_the_page_is_what_is_printed(tmp_path, monkeypatch, capsys):
    status, text = printed(tmp_path, monkeypatch, capsys)
    assert (status, text) == (1, block("text"))


@pytest.mark.parametrize(("given", "path", "value"), SPELLINGS, ids=[path for _, path, _ in SPELLINGS])
def test_old_spellings_mean_what_the_page_says(given, path, value):
    config = load(given)
    assert value_at(config, path) == json.loads(value)
    assert [each.verdict for each in config.answers() if each.note.startswith(f"now {path}: ")] == ["mapped"]


def test_there_are_old_spellings():
    assert len(SPELLINGS) == 10


def test_the_example_of_the_readme_passes(capsys):
    """As the page's first command, with the files of examples/."""
    words = ["check", str(ROOT / "examples" / "hf_zero3.json"), "--script", str(ROOT / "examples" / "hf_trainer.py")]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in report["scripts"]["rows"]} >= {"transformers"}
    assert not [each for each in report["answers"] if each["verdict"] == "refused"]
