"""DeepSpeed's public names, all of them: each is there, or says why not and what instead."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tritonspeed.integrations import facade, names
from tritonspeed.integrations.finder import Finder

LIST = Path(__file__).parent / "deepspeed_0_19_8_names.txt"
PUBLIC = {
    module: inner.split()
    for module, _, inner in (line.partition(":") for line in LIST.read_text().splitlines() if line[0] != "#")
}
ALSO_USED = [  # private or nested, and imported by transformers, accelerate, trl, peft, Lightning and OpenRLHF
    "deepspeed.runtime.zero.partition_parameters._orig_torch_arange",
    "deepspeed.runtime.zero.partition_parameters.get_accelerator",
    "deepspeed.utils.groups._get_sequence_parallel_group",
    "deepspeed.utils.groups._get_sequence_parallel_rank",
    "deepspeed.utils.groups._get_sequence_parallel_world_size",
    "deepspeed.utils.is_initialized",
    "deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES",
    "deepspeed.launcher.runner.DEEPSPEED_ENVIRONMENT_NAME",
    "deepspeed.zero.register_external_parameter",
    "deepspeed.DeepSpeedEngine.backward",
    "deepspeed.checkpointing.configure",
]
ROWS = [(module, name, row) for module, rows in names.MODULES.items() for name, row in rows.items()]


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The façade is found, in this test alone."""
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        del sys.modules[name]


def test_the_list_is_real_deepspeeds() -> None:
    assert LIST.read_text().startswith(f"# public names of DeepSpeed {names.EMULATED},")
    assert len(PUBLIC) > 600 and "initialize" in PUBLIC["deepspeed"]


def test_every_public_name_has_an_answer() -> None:
    unanswered = [
        f"{module}.{name}"
        for module, inner in PUBLIC.items()
        if module in names.MODULES
        for name in inner
        if name not in names.MODULES[module] and f"{module}.{name}" not in names.MODULES
    ]
    assert not unanswered, f"without a row: {' '.join(unanswered)}"
    unreasoned = [m for m in PUBLIC if m not in names.MODULES and names.reason(m) == names.REASONS["deepspeed"]]
    assert not unreasoned, f"refused without a reason of their own: {' '.join(unreasoned)}"


def test_a_module_of_the_table_is_one_of_deepspeeds() -> None:
    aliases = {"deepspeed.zero", "deepspeed.checkpointing"}  # attributes there, importable as modules too here
    assert set(names.MODULES) - aliases <= set(PUBLIC)


@pytest.mark.parametrize("place", ALSO_USED)
def test_what_hugging_face_touches_besides_is_there(place: str) -> None:
    assert names.look_up(place).verdict != "refused"


def test_every_row_resolves_to_an_object_or_to_a_refusal() -> None:
    for module, name, row in ROWS:
        value = getattr(importlib.import_module(module), name)
        if row.verdict == "refused":
            assert row.note and row.target is None
            assert repr(value) == f"<{module}.{name}: not provided by tritonspeed>"
        else:
            assert type(value) is not type(facade.refused("a.b", "c")), f"{module}.{name}"
        assert row.verdict != "inert" or row.note


def test_the_objects_are_the_native_ones() -> None:
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.utils import logger

    import tritonspeed as ts

    assert deepspeed.DeepSpeedEngine is ts.Engine and deepspeed.initialize.__wrapped__ is ts.initialize
    assert deepspeed.zero.Init is ts.zero.Init is partition_parameters.Init
    assert logger.name == "tritonspeed"
    assert deepspeed.dist is deepspeed.comm
    assert "Init" in dir(deepspeed.zero) and "zero" in dir(deepspeed)


def test_a_refused_name_is_importable_and_an_error_at_each_use() -> None:
    from deepspeed.pipe import PipelineModule

    says = r"deepspeed\.pipe\.PipelineModule is not provided by tritonspeed: .* ZeRO stage 3 with offload"
    with pytest.raises(NotImplementedError, match=says):
        PipelineModule(layers=[])

    class Own(PipelineModule):
        pass

    with pytest.raises(NotImplementedError, match=says):
        Own(layers=[])
    with pytest.raises(NotImplementedError, match=says):
        PipelineModule.from_layers()
    with pytest.raises(NotImplementedError, match=says):
        list(PipelineModule)
    assert not isinstance(3, PipelineModule) and issubclass(Own, PipelineModule)
    assert not hasattr(PipelineModule, "from_layers")
    assert PipelineModule.__module__ == "deepspeed.pipe" and PipelineModule.__name__ == "PipelineModule"


@pytest.mark.parametrize(
    ("statement", "kind", "says"),
    [
        ("from deepspeed.zero import Unknown", ImportError, r"deepspeed\.zero\.Unknown is not .*deepspeed-names\.md"),
        ("from deepspeed import elasticity", ImportError, r"--num_nodes MIN:MAX"),
        ("import deepspeed.unknown", ModuleNotFoundError, r"deepspeed\.unknown is not .*deepspeed-names\.md"),
        ("import deepspeed.runtime.pipe.schedule", ModuleNotFoundError, r"schedule is not .* pipeline parallelism"),
        ("from deepspeed.runtime.constants import TRAIN_BATCH_SIZE", ModuleNotFoundError, r"write a config's keys"),
        ("import deepspeed; deepspeed.unknown", AttributeError, r"deepspeed\.unknown is not .*deepspeed-names\.md"),
    ],
)
def test_what_is_not_in_the_table_says_so(statement: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        exec(statement)


def test_a_name_that_is_not_there_is_no_attribute() -> None:
    import deepspeed

    assert not hasattr(deepspeed, "unknown") and getattr(deepspeed.zero, "unknown", 7) == 7


def test_star_imports_bring_the_public_names() -> None:
    found: dict[str, Any] = {}
    exec("from deepspeed.utils.groups import *", found)
    assert found["get_data_parallel_world_size"]() == 1
    assert "_get_data_parallel_world_size" not in found


def test_importing_deepspeed_loads_no_torch_until_a_name_is_used() -> None:
    program = (
        "import sys, tritonspeed.hf, deepspeed, deepspeed.runtime.zero, deepspeed.utils\n"
        "assert deepspeed.__version__ and deepspeed.PipelineModule is not None\n"
        "assert not {'torch', 'numpy', 'triton'} & set(sys.modules)\n"
        "deepspeed.zero.Init\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
