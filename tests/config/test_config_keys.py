"""The declarations themselves: complete, consistent, and importable without torch."""

import subprocess
import sys

import pytest

from tritonspeed.config.coerce import coerce
from tritonspeed.config.config import Config
from tritonspeed.config.keys import replace_at, specs, value_at
from tritonspeed.config.parse import spellings

VALUES = [spec for spec in specs(Config).values() if spec.block is None]


@pytest.mark.parametrize("spec", VALUES, ids=lambda spec: spec.path)
def test_every_default_is_a_value_that_the_key_accepts(spec):
    assert coerce(spec, spec.default) == spec.default
    assert value_at(Config(), spec.path) == (
        None if spec.path.startswith(("optimizer.", "scheduler.")) else spec.default
    )


@pytest.mark.parametrize("spec", list(specs(Config).values()), ids=lambda spec: spec.path)
def test_every_key_says_what_it_does_and_never_refuses_its_default(spec):
    assert spec.key.general
    if callable(spec.key.inert):
        assert spec.key.inert.__doc__
    if spec.key.refuse is not None:
        assert spec.key.refuse.__doc__
        assert spec.key.refuse(spec.default) is None
        assert spec.is_open or spec.key.refuse("auto") is None


def test_no_spelling_means_two_keys():
    for prefix, known in spellings(Config).items():
        inside = [spec for spec in specs(Config).values() if spec.path[: len(spec.path) - len(spec.name)] == prefix]
        assert len(known) == sum(len(spec.names) for spec in inside), prefix


def test_replacing_a_nested_value_leaves_the_original_alone():
    config = Config()
    other = replace_at(config, "zero_optimization.leaf_module.names", ["mlp"])
    assert other.zero_optimization.leaf_module.names == ["mlp"]
    assert config.zero_optimization.leaf_module.names == []
    assert value_at(Config(), "optimizer.params.lr") is None


def test_two_configs_do_not_share_a_list():
    Config().zero_optimization.leaf_module.names.append("mlp")
    assert Config().zero_optimization.leaf_module.names == []


def test_importing_config_does_not_import_torch():
    code = "import sys, tritonspeed.config, tritonspeed.config.document; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
