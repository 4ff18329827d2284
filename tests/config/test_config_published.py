"""Configs as other projects publish them, where they lie beside the checkout: every one is read and answered.

They are not part of this repository; `test_config_shapes` has the same shapes, written anew.
"""

from pathlib import Path

import pytest

from tritonspeed.config import ModelFacts, load

FOLDER = Path(__file__).parents[3] / "shared" / "configs"
FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.skipif(not FILES, reason="no ../shared/configs beside the checkout")
def test_published_configs_are_refused_for_offload_and_tensor_parallel_only():
    for path in FILES:
        config = load(path)
        answers = config.resolve(2, ModelFacts(1024, "bfloat16"), allow_refused=True).answers()
        asked = {each.key for each in answers if each.verdict == "refused"}
        expected = set()
        for name in ("offload_optimizer", "offload_param"):
            if getattr(config.zero_optimization, name).device != "none":
                expected.add(f"zero_optimization.{name}.device")
        if config.tensor_parallel.autotp_size > 1:
            expected.add("tensor_parallel.autotp_size")
        assert asked == expected, path.name
        assert not config.origin.unknown, path.name
        assert "auto" not in {each.resolved for each in answers if isinstance(each.resolved, str)}, path.name
        # the names of the files say which those are
        assert bool(asked) == ("offload" in path.name or "autotp" in path.name or path.name in OFFLOADS), path.name


OFFLOADS = ("axolotl-zero2.json", "axolotl-zero2_torch_compile.json", "llama-factory-ds_z3_fp8_config.json")
