"""`tritonspeed` itself: which commands it lists, what it imports, how it ends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tritonspeed import __version__, cli


def test_lists_only_the_commands_that_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "absent", "a command without a module")
    assert "absent" not in cli.available_commands()
    assert {"run", "report"} <= set(cli.available_commands())
    for name in cli.available_commands():
        module = importlib.import_module(f"tritonspeed.cli.{name}")
        assert callable(module.add_arguments), name
        assert callable(module.run), name
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    assert "report" in capsys.readouterr().out


def test_unknown_command_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["trian"])
    assert end.value.code == 2
    assert "report" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"tritonspeed {__version__}\n"


def test_a_users_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "absent.py"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tritonspeed run: there is no script 'absent.py'")
    assert error.count("\n") == 1


def test_help_of_run_imports_no_torch() -> None:
    program = (
        "import sys; from tritonspeed import cli\n"
        "try: cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


def test_flags_after_the_script_are_the_scripts_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--module", "--no_local_rank", "--dry-run", "pkg.train", "--num_gpus", "7", "-q", "--", "--help"]
    assert cli.main(words) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("--kind module pkg.train --num_gpus 7 -q -- --help")
    assert "--nproc-per-node 1 " in line
