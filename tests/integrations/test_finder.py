"""How `deepspeed` is found: on the path, by a finder, never in place of a real DeepSpeed in silence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from tritonspeed.integrations import names
from tritonspeed.integrations.finder import FOLDER, path_variables

ROOT = Path(__file__).resolve().parents[2]
WAYS = {"by path": ("", {"PYTHONPATH": str(FOLDER)}), "by finder": ("import tritonspeed.hf\n", {})}

LOOK = """
import importlib.metadata, importlib.util, sys
spec = importlib.util.find_spec("deepspeed")
assert spec is not None and "deepspeed" not in sys.modules
assert importlib.metadata.metadata("deepspeed")["Name"] == "deepspeed"
assert importlib.metadata.version("deepspeed") == importlib.metadata.version("DeepSpeed") == EXPECTED
import transformers.integrations.deepspeed as hf
from accelerate.utils import is_deepspeed_available, compare_versions
from accelerate.utils.deepspeed import HfDeepSpeedConfig
assert hf.is_deepspeed_available() and is_deepspeed_available()
assert hf.HfDeepSpeedConfig.__mro__[1] is HfDeepSpeedConfig, hf.HfDeepSpeedConfig.__mro__
assert compare_versions("deepspeed", ">=", "0.18.2")
from accelerate.utils import DeepSpeedEngineWrapper
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
import deepspeed.ops.adam
import deepspeed
assert deepspeed.ops.adam.FusedAdam and deepspeed.__version__ == EXPECTED
assert sys.modules["deepspeed.runtime.zero"] is deepspeed.runtime.zero
assert deepspeed.runtime.zero.partition_parameters.ZeroParamStatus is ZeroParamStatus
assert sum(found.metadata["Name"] == "deepspeed" for found in importlib.metadata.distributions()) == 1
assert deepspeed.__file__.endswith("__init__.py")
"""


def python(program: str, *, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(program)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRITONSPEED_", "PYTHONPATH"))}
    command = [sys.executable, str(folder / "program.py")]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=folder, env={**clean, "HF_HUB_OFFLINE": "1", **env}
    )


def real_one(folder: Path, *, installed: bool) -> Path:
    """A package that looks like DeepSpeed's own, as pip installs it, or as git clones it."""
    (folder / "deepspeed" / "launcher").mkdir(parents=True)
    (folder / "deepspeed" / "__init__.py").write_text("__version__ = '0.99.1'\n")
    (folder / "deepspeed" / "launcher" / "__init__.py").write_text("")
    (folder / "deepspeed" / "launcher" / "runner.py").write_text("def main(args): print('the real runner got', args)\n")
    if installed:
        (folder / "deepspeed-0.99.1.dist-info").mkdir()
        (folder / "deepspeed-0.99.1.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.99.1\n"
        )
    else:
        (folder / "version.txt").write_text("0.99.1\n")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_hugging_face_finds_it(way: str, tmp_path: Path) -> None:
    first, env = WAYS[way]
    done = python(f"{first}EXPECTED = {names.VERSION!r}\n{LOOK}", folder=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("`deepspeed` is tritonspeed") == 1


def test_the_metadata_are_those_of_the_table() -> None:
    (folder,) = FOLDER.glob("*.dist-info")
    found = PathDistribution(folder)
    assert found.version == names.VERSION, f"rename {folder.name}, and write its METADATA anew"
    assert folder.name == f"deepspeed-{names.VERSION}.dist-info"


def test_the_finder_is_one_however_often_it_is_asked_for(tmp_path: Path) -> None:
    program = (
        "import sys, tritonspeed.hf\nfrom tritonspeed.integrations.finder import install\ninstall()\nimport deepspeed\n"
        "install()\nassert sum(type(f).__name__ == 'Finder' for f in sys.meta_path) == 1\n"
    )
    for env in ({}, {"PYTHONPATH": str(FOLDER)}):
        done = python(program, folder=tmp_path, **env)
        assert done.returncode == 0, done.stderr


def test_an_import_that_comes_too_late_is_an_error_and_no_error_where_the_path_has_it(tmp_path: Path) -> None:
    program = (  # an empty module of the name costs no second of importing
        "import sys, types\nsys.modules['accelerate'] = types.ModuleType('accelerate')\n"
        "import tritonspeed.hf\nprint('went on')\n"
    )
    done = python(program, folder=tmp_path)
    assert done.returncode == 1
    assert "`import tritonspeed.hf` comes too late: accelerate is imported already" in done.stderr
    assert "first import of the script, or start the script with `tritonspeed run`" in done.stderr
    done = python(program, folder=tmp_path, PYTHONPATH=str(FOLDER))
    assert done.stdout == "went on\n", done.stderr


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "checkout"])
def test_a_real_deepspeed_keeps_its_place_unless_forced(installed: bool, tmp_path: Path) -> None:
    real = real_one(tmp_path / "real", installed=installed)
    program = "import tritonspeed.hf\nimport deepspeed\nprint(deepspeed.__version__)\n"
    done = python(program, folder=tmp_path, PYTHONPATH=str(real))
    assert done.returncode == 1
    assert "there is a DeepSpeed 0.99.1" in done.stderr and "TRITONSPEED_AS_DEEPSPEED=1" in done.stderr
    assert installed or str(real) in done.stderr
    done = python(program, folder=tmp_path, PYTHONPATH=str(real), TRITONSPEED_AS_DEEPSPEED="1")
    assert done.stdout == f"{names.VERSION}\n", done.stderr
    assert "in place of the DeepSpeed 0.99.1" in done.stderr
    done = python("import deepspeed\nprint(deepspeed.__version__)\n", folder=tmp_path, PYTHONPATH=str(real))
    assert done.stdout == "0.99.1\n", done.stderr


def test_a_real_deepspeed_on_its_pythonpath_is_left_to_a_process(tmp_path: Path) -> None:
    real = str(real_one(tmp_path / "real", installed=True))
    assert path_variables({"PYTHONPATH": f"{FOLDER}{os.pathsep}{real}"}) == {"PYTHONPATH": real}
    assert path_variables({"PYTHONPATH": "/elsewhere"}) == {"PYTHONPATH": f"{FOLDER}{os.pathsep}/elsewhere"}
    assert path_variables({}) == {"PYTHONPATH": str(FOLDER)}


def test_a_folder_of_configs_with_that_name_is_no_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "zero3.json").write_text("{}")
    done = python("import tritonspeed.hf, deepspeed\nprint(deepspeed.__version__)\n", folder=tmp_path)
    assert done.stdout == f"{names.VERSION}\n", done.stderr


def test_deepspeeds_modules_run_as_programs(tmp_path: Path) -> None:
    for module, says in (("deepspeed.launcher.runner", "--num_gpus"), ("deepspeed.utils.zero_to_fp32", "--tag")):
        command = [sys.executable, "-m", module, "--help"]
        env = {**os.environ, "PYTHONPATH": str(FOLDER)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env)
        assert done.returncode == 0 and says in done.stdout, done.stderr


@pytest.mark.slow
def test_a_wheel_has_all_of_it(tmp_path: Path) -> None:
    pytest.importorskip(
        "setuptools", minversion="77", reason="a wheel is built offline, by the setuptools that is here"
    )
    source, venv = tmp_path / "source", tmp_path / "venv"
    shutil.copytree(ROOT / "tritonspeed", source / "tritonspeed", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=120, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    target = ["--python", str(venv / "bin" / "python"), "install", *offline, str(wheel)]
    subprocess.run([*pip, *target], check=True, timeout=120, capture_output=True)
    program = (
        "import importlib.metadata, tritonspeed, deepspeed\n"
        f"assert tritonspeed.__file__.startswith({str(venv)!r})\n"
        "assert deepspeed.__version__ == importlib.metadata.version('deepspeed')\n"
        "print(deepspeed.zero.Init.__module__)\n"
    )
    (tmp_path / "train.py").write_text(program)
    env = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}  # torch stands there; its .pth are not read
    command = [str(venv / "bin" / "deepspeed"), "--num_gpus", "1", "--no_local_rank", "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tritonspeed.zero.init\n"
