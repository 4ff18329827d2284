"""Configs as other projects publish them, where they lie beside the checkout: every one is read and answered.

They are not part of this repository; `fifty/` has the same facts, written anew, and is held to them here.
"""

from pathlib import Path

import pytest
from fifty_configs import FOLDER as FIFTY

from tritonspeed.config import ModelFacts, load
from tritonspeed.config.read import read

FOLDER = Path(__file__).parents[3] / "shared" / "configs"
FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.skipif(not FILES, reason="no ../shared/configs beside the checkout")
def test_published_configs_are_refused_for_tensor_parallelism_only():
    for path in FILES:
        config = load(path)
        answers = config.resolve(2, ModelFacts(1024, "bfloat16"), allow_refused=True).answers()
        asked = {each.key for each in answers if each.verdict == "refused"}
        expected = {"tensor_parallel.autotp_size"} if config.tensor_parallel.autotp_size > 1 else set()
        assert asked == expected, path.name
        assert not config.origin.unknown, path.name
        assert "auto" not in {each.resolved for each in answers if isinstance(each.resolved, str)}, path.name
        assert bool(asked) == ("autotp" in path.name), path.name
        offloads = "cpu" in {getattr(config.zero_optimization, name).device for name in BLOCKS}
        assert offloads == ("offload" in path.name or path.name in OFFLOADS), path.name  # the names say which


BLOCKS = ("offload_optimizer", "offload_param")
OFFLOADS = ("axolotl-zero2.json", "axolotl-zero2_torch_compile.json", "llama-factory-ds_z3_fp8_config.json")


def name_in_fifty(path):
    name = path.stem.replace("_config", "").replace("zero_stage", "zero").replace("ds_z", "zero").replace("_", "-")
    return FIFTY / f"{name}.json"


@pytest.mark.skipif(not FILES, reason="no ../shared/configs beside the checkout")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_same_facts_are_in_fifty(path):
    def facts(tree):
        return {name: value for name, value in tree.items() if not name.startswith("_")}

    assert facts(read(name_in_fifty(path))) == facts(read(path))
