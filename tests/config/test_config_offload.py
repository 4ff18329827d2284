"""The offload blocks and `aio`: what acts with which device and stage, and what is refused beside what."""

import pytest

from tritonspeed.config import load
from tritonspeed.config.config import Config
from tritonspeed.config.keys import specs
from tritonspeed.offload import Offload, Requests, Tier

OPTIMIZER, PARAM = "zero_optimization.offload_optimizer.", "zero_optimization.offload_param."
ALWAYS_INERT = {OPTIMIZER + each for each in ("pipeline_read", "pipeline_write", "fast_init", "super_offload")}
ALWAYS_INERT |= {OPTIMIZER + each for each in ("cpuadam_cores_perc", "convert_grad_on_cpu")}
ALWAYS_INERT |= {"aio.single_submit", "aio.overlap_events", "aio.use_gds"}


def every_key_given(stage, optimizer="none", param="none"):
    """A config that gives each key of the three blocks its default."""
    tree = {"train_batch_size": 1, "zero_optimization": {"stage": stage}}
    for block in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param", "aio"):
        known = {path: s.default for path, s in specs(Config).items() if path.startswith(block + ".")}
        values = {path.rpartition(".")[2]: value for path, value in known.items()}
        if block == "aio":
            tree["aio"] = values
        else:
            name = block.rpartition(".")[2]
            device = optimizer if name == "offload_optimizer" else param
            tree["zero_optimization"][name] = values | {"device": device, "nvme_path": "/nvme"}
    return load(tree).resolve(1)


def verdicts(config):
    blocks = (OPTIMIZER, PARAM, "aio.")
    return {each.key: each.verdict for each in config.answers() if each.key.startswith(blocks)}


def honoured(config):
    return {key for key, verdict in verdicts(config).items() if verdict == "honoured"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
def test_the_optimizers_keys_act_at_every_stage(stage, device):
    config = every_key_given(stage, optimizer=device)
    expected = {
        "none": {"device"},
        "cpu": {"device", "pin_memory", "ratio", "buffer_count"},
        "nvme": {"device", "pin_memory", "ratio", "nvme_path", "buffer_count"},
    }[device]
    assert {key.removeprefix(OPTIMIZER) for key in honoured(config) if key.startswith(OPTIMIZER)} == expected
    assert honoured(config).isdisjoint(ALWAYS_INERT)
    assert ("aio.block_size" in honoured(config)) == (device == "nvme")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
def test_the_parameters_keys_act_at_stage_3_alone_as_deepspeeds_do(stage, device):
    config = every_key_given(stage, param=device)
    expected = {
        "none": {"device"},
        "cpu": {"device", "pin_memory"},
        "nvme": {"device", "pin_memory", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu"},
    }[device]
    shown = {key.removeprefix(PARAM) for key in honoured(config) if key.startswith(PARAM)}
    assert shown == (expected if stage == 3 else set())
    assert config.zero_optimization.offload_param.device == (device if stage == 3 else "none")
    assert ("aio.queue_depth" in honoured(config)) == (stage == 3 and device == "nvme")
    if stage != 3:
        (row,) = [each for each in config.answers() if each.key == PARAM + "device"]
        assert (row.given, row.resolved, row.note) == (device, "none", f"acts at stage 3, this is stage {stage}")


def test_every_key_of_the_blocks_has_been_answered():
    assert set(verdicts(every_key_given(3, "nvme", "nvme"))) >= {
        path for path in specs(Config) if path.startswith((OPTIMIZER, PARAM, "aio."))
    }


@pytest.mark.parametrize("kind", ["Lamb", "Muon"])
@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_optimizers_of_whole_tensors_are_not_offloaded(kind, device):
    zero = {"stage": 2, "offload_optimizer": {"device": device, "nvme_path": "/nvme"}}
    tree = {"train_batch_size": 1, "zero_optimization": zero, "optimizer": {"type": kind.lower()}}
    with pytest.raises(ValueError, match=f"offload_optimizer.device = '{device}': {kind} needs whole tensors"):
        load(tree).resolve(1)
    zero["offload_optimizer"]["device"] = "none"
    assert load(tree).resolve(1).optimizer.type == kind
    tree["zero_optimization"] = {"stage": 3, "offload_param": {"device": "cpu"}}
    assert load(tree).resolve(1).optimizer.type == kind


@pytest.mark.parametrize(
    ("named", "other"), [("offload_optimizer", "offload_param"), ("offload_param", "offload_optimizer")]
)
def test_one_folder_serves_both_blocks(named, other):
    zero = {"stage": 3, named: {"device": "none", "nvme_path": "/nvme"}, other: {"device": "nvme"}}
    config = load({"train_batch_size": 1, "zero_optimization": zero}).resolve(1)
    assert verdicts(config)[f"zero_optimization.{named}.nvme_path"] == "honoured"
    zero[other]["nvme_path"] = "/other"
    config = load({"train_batch_size": 1, "zero_optimization": zero}).resolve(1)
    assert verdicts(config)[f"zero_optimization.{named}.nvme_path"] == "inert"
    del zero[other]["nvme_path"], zero[named]["nvme_path"]
    with pytest.raises(ValueError, match=f"zero_optimization.{other}.device = 'nvme': device is nvme and nvme_path"):
        load({"train_batch_size": 1, "zero_optimization": zero}).resolve(1)


def test_the_defaults_of_the_config_are_those_of_the_composable_api():
    config = load({"train_batch_size": 1, "zero_optimization": {"stage": 3}}).resolve(1)
    assert Offload.from_config(config) == Offload()
    assert Offload.from_config(config).requests == Requests()


def test_every_honoured_value_arrives():
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/a", "buffer_count": 7, "ratio": 0.25},
        "offload_param": {"device": "nvme", "nvme_path": "/b", "buffer_count": 3, "buffer_size": 5e6, "max_in_cpu": 9},
    }
    for block in ("offload_optimizer", "offload_param"):
        zero[block]["pin_memory"] = False
    aio = {"block_size": 2**20, "queue_depth": 16, "thread_count": 3}
    given = Offload.from_config(load({"train_batch_size": 1, "zero_optimization": zero, "aio": aio}).resolve(1))
    assert (given.optimizer, given.parameters) == (Tier.DISK, Tier.DISK)
    assert (given.path, given.parameters_path) == ("/a", "/b")
    assert (given.buffers, given.ratio, given.pin_memory) == (7, 0.25, False)
    assert (given.parameter_buffers, given.parameter_buffer_elems, given.max_in_cpu) == (3, 5_000_000, 9)
    assert given.requests == Requests(block_bytes=2**20, depth=16, threads=3)


@pytest.mark.parametrize("block", ["offload_optimizer", "offload_param"])
def test_pinning_is_forbidden_by_the_block_that_is_used(block):
    other = "offload_param" if block == "offload_optimizer" else "offload_optimizer"
    zero = {"stage": 3, block: {"device": "cpu", "pin_memory": False}, other: {"device": "none"}}
    assert Offload.from_config(load({"train_batch_size": 1, "zero_optimization": zero}).resolve(1)).pin_memory is False
    zero = {"stage": 3, block: {"device": "cpu"}, other: {"device": "none", "pin_memory": False}}
    assert Offload.from_config(load({"train_batch_size": 1, "zero_optimization": zero}).resolve(1)).pin_memory is True


def test_parameters_stay_where_they_are_below_stage_3():
    zero = {"stage": 2, "offload_param": {"device": "nvme"}, "offload_optimizer": {"device": "cpu"}}
    given = Offload.from_config(load({"train_batch_size": 1, "zero_optimization": zero}).resolve(1))
    assert (given.optimizer, given.parameters) == (Tier.HOST, Tier.DEVICE)
