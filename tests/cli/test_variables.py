"""Environment files, and the variables that travel to other hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tritonspeed.cli.variables import parse, read_files, travelling


def test_parse() -> None:
    text = "# comment\n\nNCCL_DEBUG=INFO\nexport A='b c'\nURL=x=y?z\nEMPTY=\nQ=\"\n"
    assert parse(text, "f") == {"NCCL_DEBUG": "INFO", "A": "b c", "URL": "x=y?z", "EMPTY": "", "Q": '"'}
    with pytest.raises(ValueError, match="f:2: 'no equals sign'"):
        parse("A=1\nno equals sign", "f")


def test_later_files_win(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    folder.mkdir()
    (home / ".deepspeed_env").write_text("A=home\nB=home\nC=home\nD=home\n")
    (folder / ".deepspeed_env").write_text("B=work\n")
    (home / ".tritonspeed_env").write_text("C=ours\n")
    assert read_files({}, home, folder) == {"A": "home", "B": "work", "C": "ours", "D": "home"}
    (home / "other").write_text("A=other\n")
    assert read_files({"DS_ENV_FILE": "other"}, home, folder) == {"A": "other", "C": "ours"}
    assert read_files({"DS_ENV_FILE": str(home / "other")}, home, folder)["A"] == "other"
    with pytest.raises(ValueError, match="DS_ENV_FILE=gone"):
        read_files({"DS_ENV_FILE": "gone"}, home, folder)


def test_no_secret_travels() -> None:
    env = {
        "NCCL_SOCKET_IFNAME": "eth1",
        "PYTHONPATH": "/p",
        "HF_TOKEN": "s",
        "AWS_SECRET_ACCESS_KEY": "s",
        "HOME": "/h",
    }
    assert set(travelling(env)) == {"NCCL_SOCKET_IFNAME", "PYTHONPATH"}
