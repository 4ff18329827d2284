"""`tritonspeed report` on what stands beside it: versions that were tried, and what `deepspeed` means in a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from tritonspeed import cli
from tritonspeed.cli import machine
from tritonspeed.cli.neighbours import TRIED, meanings, neighbours

CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()


def of(monkeypatch: pytest.MonkeyPatch, **versions: str) -> dict[str, tuple[str, str]]:
    monkeypatch.setattr(machine, "package_versions", lambda names: {name: versions.get(name) for name in names})
    return {each.name: (each.fits, each.says) for each in neighbours()}


def test_versions_are_told_apart(monkeypatch):
    oldest, newest = TRIED["transformers"]
    assert of(monkeypatch, transformers=oldest)["transformers"][0] == "tried"
    assert of(monkeypatch, transformers=newest)["transformers"][0] == "tried"
    assert of(monkeypatch, transformers=f"{newest}.post1")["transformers"][0] == "tried"
    assert of(monkeypatch, transformers="99.0rc1")["transformers"] == (
        "not tried",
        f"newer than {newest}, the last that was",
    )
    assert of(monkeypatch, transformers="3.9")["transformers"] == ("too old", f"install {oldest} or later")
    found = of(monkeypatch)
    assert set(found) == {*TRIED, "wandb"} and {fits for fits, _ in found.values()} == {"absent"}
    assert of(monkeypatch, wandb="0.20")["wandb"][0] == "not tried"


def test_versions_compare_by_numbers(monkeypatch):
    oldest, newest = TRIED["accelerate"]
    later = f"{Version(newest).major}.{Version(newest).minor + 100}"  # as text, it would come before
    assert of(monkeypatch, accelerate=later)["accelerate"][0] == "not tried"
    assert of(monkeypatch, accelerate="0.4")["accelerate"][0] == "too old"
    assert Version(oldest) < Version("1.2.3") < Version(newest)
    assert of(monkeypatch, accelerate="1.2.3")["accelerate"][0] == "tried"


@pytest.mark.parametrize("name", TRIED)
def test_what_constraints_pin_was_tried(name):
    pinned = [line.partition("==")[2] for line in CONSTRAINTS if line.startswith(f"{name}==")]
    oldest, newest = TRIED[name]
    assert Version(oldest) <= Version(newest)
    assert pinned in ([], [newest])


def report(path: str, **variables: str) -> dict[str, str]:
    """What the report says of `deepspeed`, in a process whose PYTHONPATH is ``path``."""
    env = {**os.environ, "PYTHONPATH": path, "TRITONSPEED_AS_DEEPSPEED": "", **variables}
    code = "import json; from tritonspeed.cli.neighbours import meanings; print(json.dumps(meanings()))"
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return json.loads(said.stdout)


def test_what_deepspeed_means(tmp_path):
    run, plain = "tritonspeed run script.py", "python script.py"
    assert report("") == {run: "tritonspeed", plain: report("")[plain]} and "nothing" in report("")[plain]
    from tritonspeed.integrations.finder import FOLDER

    assert report(str(FOLDER)) == {run: "tritonspeed", plain: "tritonspeed"}
    made_up = tmp_path / "deepspeed-0.18.1.dist-info"
    made_up.mkdir()
    (made_up / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.1\n")
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("")
    stays = report(str(tmp_path))
    assert stays[run] == "DeepSpeed 0.18.1: it stays, unless TRITONSPEED_AS_DEEPSPEED=1 is set"
    assert stays[plain] == "DeepSpeed 0.18.1"
    assert report(str(tmp_path), TRITONSPEED_AS_DEEPSPEED="1")[run] == "tritonspeed"


def test_both_forms_of_the_report_tell_it(capsys):
    assert cli.main(["report", "--json", "--no-kernels"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in facts["neighbours"]} == {each.name for each in neighbours()}
    assert facts["deepspeed"] == meanings()
    assert cli.main(["report", "--no-kernels"]) == 0
    table = capsys.readouterr().out
    for each in facts["neighbours"]:
        assert each["name"] in table and each["fits"] in table
    assert all(started in table for started in facts["deepspeed"])
