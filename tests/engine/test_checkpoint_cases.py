"""Checkpoints of models that have changed, of odd models, of runs that were cut off: what is loaded, refused, said."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import make, said, settings, weights
from models import Net, batch
from safetensors.torch import load_file
from test_checkpoint import assert_same, config, disk, state, train
from tolerances import tolerance
from torch import nn

import tritonspeed as ts
from tritonspeed.checkpoint import CheckpointError, CorruptCheckpoint, MismatchedCheckpoint, SaveFailed


def tied() -> Net:
    return Net(tied=True)


def frozen() -> Net:
    net = Net()
    net.embed.weight.requires_grad_(False)
    net.blocks[1].up.requires_grad_(False)
    return net


class Counting(Net):
    """With a batch norm, whose statistics are each rank's own, and a buffer that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.BatchNorm1d(13)
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = super().hidden(tokens)
        return self.seen(x.flatten(0, 1)).view_as(x)


class Deeper(Net):
    def __init__(self) -> None:
        super().__init__(depth=4)


def cycle(folder: str, given: dict[str, Any], model: type[Net]) -> None:
    """Save, load into a fresh engine, train on: the same bits."""
    engine = make(given, model)
    train(engine, 0, 3)
    engine.save_checkpoint(folder)
    torch.manual_seed(1)
    expected = train(engine, 3, 6), state(engine), dict(engine.module.named_buffers())
    other = make(given, model)
    other.load_checkpoint(folder)
    torch.manual_seed(1)
    assert train(other, 3, 6) == expected[0]
    assert_same(state(other), expected[1])
    for name, buffer in other.module.named_buffers():
        assert buffer.equal(expected[2][name]), name


@pytest.mark.parametrize("model", [tied, frozen, Counting])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_tied_frozen_and_buffered_models_resume(ranks, tmp_path, stage, model):
    ranks(2, cycle, str(tmp_path), config(stage), model)


def grown(folder: str) -> None:
    small = make(config(3))
    train(small, 0, 2)
    small.save_checkpoint(folder)
    deeper = make(config(2), Deeper)
    train(deeper, 0, 1)
    before = state(deeper)
    absent = "not in the checkpoint: .*'blocks.3.norm.weight'.*load_module_strict"
    with pytest.raises(MismatchedCheckpoint, match=absent):
        deeper.load_checkpoint(folder)
    assert_same(state(deeper), before)
    with said() as lines:
        deeper.load_checkpoint(folder, load_module_strict=False)
    assert any("loaded what fits" in line and "blocks.3.mix.weight" in line for line in lines)
    after, expected = state(deeper), state(small)
    names = dict(deeper.module.named_parameters())
    assert all(after[n].equal(before[n] if "blocks.3" in n else expected[n]) for n in names)
    assert "exp_avg of blocks.3.mix.weight" not in after, "what was not there starts anew"
    assert after["exp_avg of blocks.2.mix.weight"].equal(expected["exp_avg of blocks.2.mix.weight"])
    deeper.save_checkpoint(folder, tag="deeper")
    with pytest.raises(MismatchedCheckpoint, match="only in the checkpoint: 'blocks.3"):
        small.load_checkpoint(folder, tag="deeper")
    small.load_checkpoint(folder, tag="deeper", load_module_strict=False)
    assert state(small)["blocks.1.up.weight"].equal(state(deeper)["blocks.1.up.weight"])


def test_added_and_removed_parameters(ranks, tmp_path):
    ranks(2, grown, str(tmp_path))


def reshaped(folder: str) -> None:
    make(config(1)).save_checkpoint(folder)
    with pytest.raises(MismatchedCheckpoint, match=r"'embed.weight' is \(37, 14\) here and \(37, 13\)"):
        make(config(1), lambda: Net(width=14)).load_checkpoint(folder)


def test_another_shape_is_refused(ranks, tmp_path):
    ranks(1, reshaped, str(tmp_path))


def without_frozen(folder: str) -> None:
    engine = make(config(3), frozen)
    train(engine, 0, 2)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    files = {name for file in pathlib.Path(folder).rglob("*parameters*.safetensors") for name in load_file(file)}
    assert not files, "frozen parameters were written"
    other = make(config(1), frozen)
    train(other, 0, 1)
    other.load_checkpoint(folder)
    assert_same(state(other), state(engine))


def test_frozen_parameters_can_be_left_out(ranks, tmp_path):
    ranks(2, without_frozen, str(tmp_path))


def flags(folder: str) -> None:
    engine = make(config(2))
    train(engine, 0, 4)
    engine.save_checkpoint(folder)
    expected = state(engine)
    only = make(config(2))
    train(only, 0, 1)
    path, _ = only.load_checkpoint(folder, load_module_only=True)
    got = state(only)
    assert path and got["steps"] == 1 and got["embed.weight"].equal(expected["embed.weight"])
    assert not got["exp_avg of embed.weight"].equal(expected["exp_avg of embed.weight"])
    bare = make(config(2))
    bare.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert bare.global_steps == 4 and bare.get_lr() != engine.get_lr()
    assert ts.zero.safe_get_full_optimizer_state(bare.module.norm.weight, "exp_avg") is None
    seen = {}
    custom = make(config(3))

    def load(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
        seen.update(src)
        dst.load_state_dict({n: v + 1 for n, v in src.items()})

    custom.load_checkpoint(folder, custom_load_fn=load)
    assert seen.keys() == weights(engine).keys()
    assert weights(custom)["head.weight"].equal(expected["head.weight"] + 1)
    plain = ts.initialize(model=Net(), config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    plain[0].load_checkpoint(folder)
    assert weights(plain[0])["norm.weight"].equal(expected["norm.weight"])


def test_what_is_loaded_can_be_chosen(ranks, tmp_path):
    ranks(2, flags, str(tmp_path))


def damaged(folder: str) -> None:
    engine = make(config(2))
    states = {}
    for _ in range(3):
        train(engine, 0, 1)
        engine.save_checkpoint(folder)
        states[engine.global_steps] = state(engine)
    if dist.get_rank() == 0:
        victim = next(pathlib.Path(folder, "global_step3", "rank-1-of-2").glob("*exp_avg.safetensors"))
        content = bytearray(victim.read_bytes())
        content[5000] ^= 1
        victim.write_bytes(content)
    dist.barrier()
    other = make(config(3))
    with pytest.raises(CorruptCheckpoint, match="exp_avg"):
        other.load_checkpoint(folder, tag="global_step3")
    with said() as lines:
        path, _ = other.load_checkpoint(folder)
    assert path is not None and path.endswith("global_step2")
    assert any("global_step3 cannot be loaded, the one before it is tried" in line for line in lines)
    assert_same(state(other), states[2])
    with pytest.raises(CheckpointError, match="no checkpoint 'global_step9'.*global_step1, global_step2, global_step3"):
        other.load_checkpoint(folder, tag="global_step9")
    with said() as lines:
        assert other.load_checkpoint(pathlib.Path(folder) / "nothing") == (None, None)
    assert any("no checkpoint to load" in line for line in lines)


def test_a_damaged_checkpoint_is_passed_over_and_said(ranks, tmp_path):
    ranks(2, damaged, str(tmp_path))


def in_background(folder: str, path: str | None) -> None:
    block = {"async_save": True, "keep_last": 2, "save_model": True}
    given = config(3, 2, "bf16", checkpoint=block, **({"zero_optimization": disk(3, path)} if path else {}))
    engine = make(given)
    expected, seen = {}, {}
    for step in range(4):
        train(engine, 2 * step, 2 * step + 2)
        expected[engine.global_steps], seen = state(engine), weights(engine)
        engine.save_checkpoint(folder)
    train(engine, 8, 12)
    engine.wait_for_checkpoint()
    dist.barrier()  # rank 0 deletes the oldest
    tags = sorted(p.name for p in pathlib.Path(folder).iterdir() if p.is_dir())
    assert tags == ["global_step3", "global_step4"]
    other = make(config(1, 2, "bf16"))
    other.load_checkpoint(folder, tag="global_step3")
    assert_same(state(other), expected[3])
    other.load_checkpoint(folder)
    assert_same(state(other), expected[4])
    files = load_file(pathlib.Path(folder, "global_step4", "model", "model.safetensors"))
    assert files.keys() == seen.keys() and all(files[n].equal(seen[n]) for n in seen)
    engine.destroy()


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_saved_in_the_background_while_training_goes_on(ranks, tmp_path, tier):
    ranks(2, in_background, str(tmp_path / "saved"), str(tmp_path) if tier == "disk" else None)


def failing(folder: str) -> None:
    engine = make(config(1, checkpoint={"async_save": True}))
    train(engine, 0, 1)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    if dist.get_rank() == 1:
        engine._saver._requests = None  # what a rank's writer stumbles over
    train(engine, 0, 1)
    engine.save_checkpoint(folder)
    with pytest.raises(SaveFailed, match="rank 1"):
        engine.wait_for_checkpoint()
    other = make(config(1))
    path, _ = other.load_checkpoint(folder)
    assert path is not None and path.endswith("global_step1")


def test_a_failed_background_save_is_raised_on_all_ranks(ranks, tmp_path):
    ranks(2, failing, str(tmp_path))


def tags(folder: str) -> None:
    fails = make(config(0, checkpoint={"tag_validation": "Fail"}))
    with pytest.raises(ValueError, match=r"different tags, rank \d 'mine\d' and rank 0 'mine0'"):
        fails.save_checkpoint(folder, tag=f"mine{dist.get_rank()}")
    with said() as lines:
        make(config(0)).save_checkpoint(folder, tag=f"mine{dist.get_rank()}")
    assert any("different tags" in line for line in lines) == (dist.get_rank() == 0)
    assert pathlib.Path(folder, "latest").read_text().strip() == "mine0"
    with pytest.raises(SaveFailed, match=r"client_state.*hook.*is a builtin_function"):
        fails.save_checkpoint(folder, client_state={"hook": print})
    make(config(0)).save_checkpoint(folder, tag="other", save_latest=False)
    assert pathlib.Path(folder, "latest").read_text().strip() == "mine0"


def test_tags_and_client_state_are_checked(ranks, tmp_path):
    ranks(2, tags, str(tmp_path))


def halfway(folder: str, stage: int) -> None:
    """Two ranks stop after 3 of 4 micro-steps of 2 samples: 12 of 16."""
    engine = make(config(stage, 4, optimizer="sgd"))
    for i in range(4 + 3):
        engine.backward(engine(*batch(dist.get_rank(), i)))
        engine.step()
    engine.save_checkpoint(folder)


def the_rest(folder: str, stage: int) -> dict[str, torch.Tensor]:
    """One rank goes on, with 8 micro-steps a step: the two samples of each rank that are left."""
    engine = make(config(stage, 8, optimizer="sgd"))
    engine.load_checkpoint(folder)
    assert (engine.global_steps, engine.micro_steps) == (1, 8 + 6)
    for rank in range(2):
        engine.backward(engine(*batch(rank, 7)))
        engine.step()
    assert engine.global_steps == 2
    return weights(engine)


def unbroken() -> dict[str, torch.Tensor]:
    engine = make(config(1, 4, optimizer="sgd"))
    for i in range(8):
        engine.backward(engine(*batch(dist.get_rank(), i)))
        engine.step()
    return weights(engine)


def uneven(folder: str) -> None:
    engine = make(config(2, 2, optimizer="sgd", train_micro_batch_size_per_gpu=8))
    with pytest.raises(MismatchedCheckpoint, match="3 micro-steps into a step of 4 × 2 samples × 2 ranks"):
        engine.load_checkpoint(folder)
    engine.load_checkpoint(folder, load_module_strict=False)
    assert (engine.global_steps, engine.micro_steps) == (1, 2)


@pytest.mark.parametrize(("one", "other"), [(0, 3), (2, 1), (3, 0), (1, 2)])
def test_an_accumulation_goes_on_at_another_world_size(ranks, tmp_path, one, other):
    ranks(2, halfway, str(tmp_path), one)
    got, expected = ranks(1, the_rest, str(tmp_path), other)[0], ranks(2, unbroken)[0]
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **tolerance(torch.float32, 37 * 16))
    ranks(1, uneven, str(tmp_path))


def scaled(folder: str) -> None:
    block = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}
    engine = make({**settings(2), "fp16": block, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}})
    train(engine, 0, 5)
    engine.save_checkpoint(folder)
    other = make({**settings(3), "fp16": block, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}})
    other.load_checkpoint(folder)
    assert other.optimizer.scaler.state_dict() == engine.optimizer.scaler.state_dict()
    assert other.skipped_steps == engine.skipped_steps and other.loss_scale() != 2.0**20


def test_the_loss_scale_goes_on(ranks, tmp_path):
    ranks(2, scaled, str(tmp_path))


def sixteen_bits(folder: str) -> None:
    engine = make(config(3, precision="bf16"), tied)
    with said() as lines:
        assert engine.save_16bit_model(folder) is False
    assert any("stage3_gather_16bit_weights_on_model_save is false" in line for line in lines)
    block = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    engine = make(config(3, precision="bf16", zero_optimization=block), tied)
    expected = weights(engine)
    assert engine.save_16bit_model(folder) is True
    assert engine.save_16bit_model(folder, "model.safetensors") is True
    dist.barrier()
    plain = torch.load(pathlib.Path(folder, "pytorch_model.bin"), weights_only=True)
    assert plain.keys() == expected.keys() and all(plain[n].equal(v) for n, v in expected.items())
    files = load_file(pathlib.Path(folder, "model.safetensors"))
    assert all(files[n].equal(expected[n]) for n in files) and set(expected) - set(files) == {"head.weight"}
    whole = engine._zero3_consolidated_16bit_state_dict()
    assert (whole is None) == (dist.get_rank() != 0)
    with pytest.raises(ValueError, match="at ZeRO stage 1"):
        make(config(1))._zero3_consolidated_16bit_state_dict()
    engine.load_module_state_dict({"module": {n: v * 2 for n, v in expected.items()}})
    assert weights(engine)["norm.weight"].equal(expected["norm.weight"] * 2)


def test_whole_weights_in_one_file(ranks, tmp_path):
    ranks(2, sixteen_bits, str(tmp_path))


def from_weights(folder: str) -> None:
    engine = make(config(2, 1, "bf16", checkpoint={"save_model": True}), Counting)
    train(engine, 0, 2)
    engine.save_checkpoint(folder)
    other = make(config(3, 1, "bf16"), Counting)
    other.load_checkpoint(pathlib.Path(folder, "global_step2", "model"), load_optimizer_states=False)
    got, expected = weights(other), weights(engine)
    rank0 = dist.get_rank() == 0
    wrong = [n for n in got if not got[n].equal(expected[n]) and (rank0 or "running" not in n)]  # rank 0 has written
    assert not wrong, wrong


def test_plain_weights_are_loaded_with_their_buffers(ranks, tmp_path):
    ranks(2, from_weights, str(tmp_path))
