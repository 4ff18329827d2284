"""`tritonspeed check --script`: what it says of names, engines, configs and launch, without running anything."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tritonspeed as ts
from tritonspeed.cli import check, check_script, main
from tritonspeed.cli.check import add_arguments, run
from tritonspeed.cli.engine_members import ALTERNATIVES, members_here
from tritonspeed.cli.neighbours import Neighbour
from tritonspeed.zero import ZeroOptimizer

SCRIPTS = Path(__file__).parents[1] / "integrations" / "scripts"
RECORDED = Path(__file__).with_name("deepspeed_engine_members.txt")


@pytest.fixture
def call(tmp_path, capsys):
    """``call(words, train_py=...)`` writes the files and checks: (status, the report as JSON, its rows by name)."""

    def check_files(*words, **files):
        for name, text in files.items():
            path = tmp_path / name.replace("_py", ".py").replace("_json", ".json")
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        status = run(parser.parse_args([*words, "--json"]))
        report = json.loads(capsys.readouterr().out)
        return status, report, {row["name"]: row for row in report["scripts"]["rows"]}

    return check_files


def verdicts(rows):
    return {name: row["verdict"] for name, row in rows.items()}


def test_names_however_they_are_imported(call):
    status, report, rows = call(
        "--script",
        "train.py",
        train_py="""\
            import deepspeed
            import deepspeed as ds, deepspeed.comm as dist
            from deepspeed.ops.adam import DeepSpeedCPUAdam as Adam
            from deepspeed import zero
            from deepspeed.runtime.fp16 import onebit
            import importlib

            with zero.Init(), ds.zero.GatheredParameters([]):
                Adam([])
            dist.get_rank()
            module = importlib.import_module("deepspeed.utils")
            module.safe_get_full_grad(None)
            served = getattr(deepspeed, "init_inference")
            served(None)
            onebit.OnebitAdam([])
            deepspeed.PipelineModule(layers=[])
            deepspeed.no_such_thing()
            torch = deepspeed.get_accelerator().current_device_name()
            """,
    )
    assert status == 1
    assert verdicts(rows) == {
        "deepspeed.runtime.fp16.onebit": "refused",  # a module that is not there
        "deepspeed.init_inference": "refused",
        "deepspeed.PipelineModule": "refused",
        "deepspeed.no_such_thing": "refused",
        "deepspeed.ops.adam.DeepSpeedCPUAdam": "honoured",
        "deepspeed.zero.Init": "honoured",
        "deepspeed.zero.GatheredParameters": "honoured",
        "deepspeed.comm.get_rank": "honoured",
        "deepspeed.utils.safe_get_full_grad": "honoured",
        "deepspeed.get_accelerator": "honoured",
    }
    order = [row["verdict"] for row in report["scripts"]["rows"]]
    assert order == sorted(order, key=["refused", "warning", "inert", "honoured"].index)
    assert rows["deepspeed.PipelineModule"]["places"] == ["train.py:16"]
    assert "pipeline parallelism is not built" in rows["deepspeed.PipelineModule"]["note"]
    assert rows["deepspeed.ops.adam.DeepSpeedCPUAdam"]["places"] == ["train.py:3", "train.py:9"]


def test_a_refused_name_that_is_not_called_stops_nothing(call):
    status, _, rows = call(
        "--script",
        "train.py",
        train_py="""\
            import deepspeed
            from deepspeed.pipe import PipelineModule

            def is_pipeline(model: PipelineModule) -> bool:
                return isinstance(model, (PipelineModule, deepspeed.PipelineEngine))

            try:
                from deepspeed.nothing_like_it import Extra
            except ImportError:
                Extra = None
            if Extra:
                Extra()
            """,
    )
    assert status == 0
    assert verdicts(rows) == {
        "deepspeed.pipe.PipelineModule": "inert",
        "deepspeed.PipelineEngine": "inert",
        "deepspeed.nothing_like_it": "inert",
    }
    assert "goes on without it" in rows["deepspeed.nothing_like_it"]["note"]


def test_caught_at_import_but_called_is_refused(call):
    """A refused name can be imported, so the handler of the import never runs."""
    status, _, rows = call(
        "--script",
        "train.py",
        train_py="""\
            try:
                from deepspeed.pipe import PipelineModule
            except ImportError:
                PipelineModule = None
            net = PipelineModule(layers=[])
            """,
    )
    assert (status, verdicts(rows)) == (1, {"deepspeed.pipe.PipelineModule": "refused"})


def test_members_of_what_initialize_returned(call):
    status, _, rows = call(
        "--script",
        "train.py",
        train_py="""\
            import deepspeed

            class Run:
                def __init__(self, model):
                    self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, config="missing.json")
                    for batch in self.engine.deepspeed_io(None):
                        self.engine.backward(self.engine(batch))
                        self.engine.step()
                    print(self.optimizer.cur_scale, self.optimizer.param_groups, self.engine.lm_head)

            first = deepspeed.initialize(model=None, mesh_param=(1, 2))[0]
            first.allreduce_gradients()

            def save(engine):
                engine.save_checkpoint("out")
                engine.save_zero_checkpoint("out", "tag")
            """,
    )
    assert status == 1
    assert verdicts(rows) == {
        "engine.deepspeed_io": "refused",
        "optimizer.cur_scale": "refused",
        "initialize(mesh_param=...)": "refused",
        "engine.allreduce_gradients": "refused",
        "engine.save_zero_checkpoint": "refused",
        "config missing.json": "warning",
        "deepspeed.initialize": "honoured",
        "engine.backward": "honoured",
        "engine.step": "honoured",
        "engine.save_checkpoint": "honoured",
        "optimizer.param_groups": "honoured",
    }
    assert "training_data" in rows["engine.deepspeed_io"]["note"]
    assert "save_checkpoint()" in rows["engine.save_zero_checkpoint"]["note"]


def test_what_a_sharded_parameter_is_asked(call):
    status, _, rows = call(
        "--script",
        "train.py",
        train_py="""\
            def count(p):
                return p.ds_numel if hasattr(p, "ds_id") else p.numel()

            def gathered(p):
                p.ds_persist = True
                return p.ds_secondary_tensor, p.ds_config
            """,
    )
    assert status == 1
    assert verdicts(rows) == {"parameter.ds_secondary_tensor": "refused", "parameter.ds_numel": "honoured"}


def test_a_name_is_an_engines_from_initialize_on(call):
    status, _, rows = call(
        "--script",
        "train.py",
        train_py="""\
            import deepspeed

            def main(model, optimizer):
                print(model.num_experts, optimizer.cur_scale)
                model, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer)
                model.training_data = None
                model.step()
                return model.num_experts
            """,
    )
    assert status == 0
    expected = {"deepspeed.initialize": "honoured", "engine.step": "honoured", "engine.num_experts": "warning"}
    assert verdicts(rows) == expected  # the last may be the module's own


def test_configs_that_the_script_names_are_checked(call):
    status, _, rows = call(
        "--script",
        "train.py",
        train_py="""\
            import deepspeed
            from transformers import TrainingArguments
            from transformers.integrations import HfDeepSpeedConfig

            GOOD = {"train_batch_size": 4, "zero_optimization": {"stage": 2, "cpu_offload": False}}
            kept = HfDeepSpeedConfig({"zero_optimization": {"stagee": 3}})
            args = TrainingArguments("out", deepspeed="zero.json")
            engine, *_ = deepspeed.initialize(model=None, config=GOOD)
            """,
        zero_json='{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}',
    )
    assert status == 1
    found = {(row["name"], row["verdict"]) for row in rows.values()}
    assert ("config zero.json", "refused") in found
    assert "zero_quantized_weights: quantised communication" in rows["config zero.json"]["note"]
    assert rows["transformers.integrations.HfDeepSpeedConfig"]["verdict"] == "honoured"


def test_a_dict_with_mistakes_and_one_without(call):
    status, report, _ = call(
        "--script",
        "train.py",
        train_py="""\
            import deepspeed
            GOOD = {"train_batch_size": 4, "zero_optimization": {"stage": 2, "cpu_offload": False}}
            deepspeed.initialize(model=None, config=GOOD)
            deepspeed.initialize(model=None, config={"zero_optimization": {"stagee": 3}})
            """,
    )
    rows = [row for row in report["scripts"]["rows"] if row["name"] == "config {...}"]
    assert status == 1
    assert [(row["verdict"], row["places"]) for row in rows] == [
        ("refused", ["train.py:4"]),
        ("honoured", ["train.py:3"]),
    ]
    assert "did you mean 'stage'" in rows[0]["note"]
    assert rows[1]["note"] == "keys: 2 honoured, 1 mapped"


def test_files_that_it_imports_are_read_too(call):
    status, report, rows = call(
        "--script",
        "main.py",
        main_py="from pkg import model\nimport helpers\nimport json",
        helpers_py="import main, deepspeed\ndeepspeed.init_inference(None)",  # a circle, too
        unread_py="import deepspeed\ndeepspeed.PipelineModule()",
        **{
            "pkg/__init__.py": "",
            "pkg/model.py": "from .deep import name",
            "pkg/deep.py": "from deepspeed.utils import logger as name",
        },
    )
    assert status == 1
    assert verdicts(rows) == {"deepspeed.init_inference": "refused", "deepspeed.utils.logger": "honoured"}
    assert report["scripts"]["asked"] == ["main.py"]
    assert sorted(report["scripts"]["imported"]) == ["__init__.py", "deep.py", "helpers.py", "model.py"]


def test_a_folder_and_a_notebook(call, tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["import deepspeed.pipe"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "!pip install deepspeed\n", "import deepspeed"]},
        {"cell_type": "code", "source": "%%bash\ndeepspeed train.py"},
        {"cell_type": "code", "source": ["x = 1\n", "deepspeed.PipelineModule(x)"]},
    ]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "book.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "work" / ".venv").mkdir()
    (tmp_path / "work" / ".venv" / "hidden.py").write_text("import deepspeed\ndeepspeed.init_inference()")
    status, report, rows = call("--script", "work", **{"work/a.py": "import deepspeed\ndeepspeed.initialize()"})
    assert status == 1
    assert report["scripts"]["asked"] == ["a.py", "book.ipynb"]
    assert rows["deepspeed.PipelineModule"]["places"] == ["book.ipynb[3]:2"]
    assert "deepspeed.init_inference" not in rows


def test_launch_and_environment(call):
    status, report, rows = call(
        "--script",
        "train.py",
        train_py="""\
            import os, subprocess
            import transformers
            import tritonspeed.hf
            os.environ["DS_BUILD_FUSED_ADAM"] = "1"
            os.environ.setdefault("DS_ACCELERATOR", "cuda")
            os.environ.update({"CUDA_HOME": "/usr/local/cuda"}, OMP_NUM_THREADS="1")
            subprocess.run(["deepspeed", "--num_gpus", "2", "x.py"])
            os.system("ds_report")
            """,
    )
    assert status == 1
    assert rows["import tritonspeed.hf"] == {
        "name": "import tritonspeed.hf",
        "verdict": "refused",
        "note": "comes after transformers on line 2, which has looked for deepspeed by then: make it the first",
        "places": ["train.py:3"],
    }
    assert rows["transformers"]["note"].startswith(importlib.metadata.version("transformers"))
    expected = {"DS_BUILD_FUSED_ADAM": 4, "DS_ACCELERATOR": 5, "CUDA_HOME": 6}
    for name, line in expected.items():
        assert rows[f"environment {name}"]["verdict"] == "inert"
        assert rows[f"environment {name}"]["places"] == [f"train.py:{line}"]
    assert "environment OMP_NUM_THREADS" not in rows
    assert rows["command deepspeed"]["verdict"] == "honoured"
    assert rows["command ds_report"]["verdict"] == "warning"
    assert report["scripts"]["start"] == ""


def test_how_to_start_it(call):
    right = "import tritonspeed.hf\nimport deepspeed\ndeepspeed.init_distributed()"
    status, report, rows = call("--script", "train.py", train_py=right)
    assert (status, report["scripts"]["start"]) == (0, "")
    assert "import tritonspeed.hf" not in rows
    _, report, _ = call("--script", "train.py", train_py="import trl")
    assert report["scripts"]["start"].startswith("start it with `tritonspeed run train.py`")
    _, report, rows = call("--script", "train.py", train_py="import helpers", helpers_py=right)
    assert "first line of the script itself" in rows["import tritonspeed.hf"]["note"]


def test_a_framework_too_old_or_missing(call, monkeypatch):
    said = {
        "transformers": Neighbour("transformers", "4.20.1", "too old", "install 4.51.3 or later"),
        "trl": Neighbour("trl", None, "absent", "tried with 0.24.0 to 1.16.0"),
    }
    monkeypatch.setattr(check_script, "_neighbours", lambda: said)
    _, _, rows = call("--script", "train.py", train_py="import transformers, trl")
    assert verdicts(rows) == {"transformers": "warning", "trl": "warning"}
    assert rows["transformers"]["note"] == "4.20.1: too old, install 4.51.3 or later"
    assert rows["trl"]["note"] == "imported, and not installed here; tried with 0.24.0 to 1.16.0"


def test_a_place_that_transformers_5_has_no_more(call):
    text = "from transformers import deepspeed\nfrom transformers.deepspeed import HfDeepSpeedConfig"
    status, _, rows = call("--script", "train.py", train_py=text)
    assert (status, rows["transformers.deepspeed"]["verdict"]) == (0, "warning")
    assert rows["transformers.deepspeed.HfDeepSpeedConfig"]["verdict"] == "warning"
    assert "import it from transformers.integrations" in rows["transformers.deepspeed.HfDeepSpeedConfig"]["note"]


def test_a_script_that_is_no_python(call):
    status, report, _ = call("--script", "train.py", train_py="import deepspeed\nif True print(1)")
    assert status == 1
    assert report["scripts"]["errors"][0].startswith("train.py:2: not valid Python")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a ds_config.json, a script with --script, or both"),
        (["--script", "nowhere.py"], "no script at 'nowhere.py'"),
        (["--script", "."], "no .py or .ipynb in the folder"),
        (["--script", "ds.json"], "a config goes before --script"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, words, message):
    (tmp_path / "ds.json").write_text("{}")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        run(parser.parse_args(words))


def test_config_and_script_on_one_screen(tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 4, "zero_optimization": {"stage": 2}}')
    lines = ["import deepspeed", "from deepspeed.zero import Init, GatheredParameters", "deepspeed.init_inference(0)"]
    (tmp_path / "train.py").write_text("\n".join(lines))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["ds.json", "--script", "train.py"])) == 1
    out = capsys.readouterr().out
    assert out.index("zero_optimization.stage") < out.index("deepspeed.init_inference")
    assert out.index("init_inference") < out.index("deepspeed.zero.Init, GatheredParameters")
    assert "1 refused, 2 honoured" in out
    assert out.splitlines()[-1].startswith("start it with `tritonspeed run train.py`")
    assert len(out.splitlines()) < 40


def test_a_small_window(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "WIDTH_OF_A_PIPE", 80)
    lines = ["import deepspeed", "from deepspeed.zero import Init, GatheredParameters", "deepspeed.init_inference(0)"]
    (tmp_path / "train.py").write_text("\n".join(lines))
    assert main(["check", "--script", "train.py"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "refused  deepspeed.init_inference  train.py:3" in out
    assert "honoured deepspeed.zero.Init, GatheredParameters" in out


def test_users_scripts_that_run_are_not_refused(call):
    """What the tests of integrations/ run, this report lets through."""
    paths = [str(path) for path in sorted(SCRIPTS.glob("*.py"))]
    assert len(paths) > 3
    status, report, _ = call("--script", *paths)
    assert status == 0
    assert {row["verdict"] for row in report["scripts"]["rows"]} <= {"honoured", "inert"}


def test_neither_torch_nor_the_script_is_imported(tmp_path):
    (tmp_path / "train.py").write_text("import deepspeed\nraise SystemExit('it ran')\ndeepspeed.init_inference()")
    program = (
        "import sys\nfrom tritonspeed.cli import main\nstatus = main(['check', '--script', 'train.py'])\n"
        "print([m for m in ('torch', 'triton', 'numpy', 'transformers', 'deepspeed') if m in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[] 1", done.stderr


def test_every_member_of_deepspeeds_engine_is_here_or_has_an_alternative():
    recorded = {line for line in RECORDED.read_text().splitlines() if not line.startswith("#")}
    assert len(recorded) > 200
    here = set(dir(ts.Engine)) | members_here("engine")
    assert recorded - here == (recorded & set(ALTERNATIVES["engine"])) - here


def test_what_is_read_of_our_engine_is_true():
    public = {name for name in members_here("engine") if not name.startswith("_")}
    methods = {name for name in public if callable(getattr(ts.Engine, name, None))}
    assert {"backward", "step", "save_checkpoint", "get_global_grad_norm", "no_sync"} <= methods
    own = {name for name in vars(ZeroOptimizer) if not name.startswith("__")}
    assert own - members_here("optimizer") <= {"_abc_impl"}


def test_what_hugging_face_fills_in_is_not_resolved_without_it(tmp_path, capsys):
    (tmp_path / "ds.json").write_text(
        '{"train_batch_size": 1, "gradient_clipping": "auto", "zero_optimization": {"stage": 2}}'
    )
    script = tmp_path / "train.py"
    for text, resolved in (("from transformers import Trainer", "auto"), ("import deepspeed", 1.0)):
        script.write_text(text)
        main(["check", str(tmp_path / "ds.json"), "--script", str(script), "--json"])
        answers = {each["key"]: each for each in json.loads(capsys.readouterr().out)["answers"]}
        assert answers["gradient_clipping"]["resolved"] == resolved
        assert ("Hugging Face" in answers["gradient_clipping"]["note"]) == (resolved == "auto")
        assert answers["zero_optimization.stage"]["resolved"] == 2
