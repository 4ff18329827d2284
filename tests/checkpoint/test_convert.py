"""One kind of checkpoint made into another: what both can say is the same to the bit, the rest is listed."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from run_of_two import BUFFERS, PARAMETERS, STEP, make, state_of, values
from safetensors.torch import load_file, save_file

from tritonspeed.checkpoint import CorruptCheckpoint
from tritonspeed.checkpoint.convert import convert
from tritonspeed.checkpoint.folder import latest_tag
from tritonspeed.checkpoint.opening import open_source
from tritonspeed.checkpoint.stored import verify


def read_all(source):
    """{kind: {name: values}} of everything."""
    found = {}
    for name, facts in source.parameters.items():
        numel = torch.Size(facts.shape).numel()
        for kind in source.kinds(name) if numel else ():
            found.setdefault(kind, {})[name] = source.read(kind, name, 0, numel)
    return found


def assert_same(found, wanted):
    assert {k: set(v) for k, v in found.items()} == {k: set(v) for k, v in wanted.items()}
    for kind, tensors in wanted.items():
        for name, value in tensors.items():
            assert found[kind][name].dtype == value.dtype, (kind, name)
            assert torch.equal(found[kind][name].view(torch.uint8), value.view(torch.uint8)), (kind, name)


def test_ours_of_two_ranks_becomes_ours_of_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tritonspeed.checkpoint.convert.BUCKET_ELEMS", 400)
    told = []
    done = convert(
        make(tmp_path / "a" / "global_step12"), tmp_path / "b" / "again", on_progress=lambda *x: told.append(x)
    )
    assert done.kind == "a checkpoint of tritonspeed"
    assert list(done.left_out) == [
        "what other ranks than 0 kept for themselves: random states, data position, client_state"
    ]
    assert (
        told[-1]
        == (done.num_elems, done.num_elems)
        == (told[-1][0], sum(len(v) for k in values().values() for v in k.values()))
    )
    assert latest_tag(tmp_path / "b") == "again"
    assert verify(tmp_path / "b" / "again") == STEP
    assert len(list((tmp_path / "b" / "again" / "rank-0-of-1").glob("*.master.safetensors"))) > 2
    source = open_source(tmp_path / "b")
    assert dict(source.parameters) == PARAMETERS
    assert_same(read_all(source), values())
    assert source.scalars("up.bias") == {"step": 11.0} and source.scalars("scale") == {}
    wanted, own = state_of(0), source.rank_state(0)
    assert asdict(source.facts) == wanted["run"]
    assert own["data"] == wanted["data"] and own["client_state"] == wanted["client_state"]
    assert torch.equal(own["random"]["torch"], wanted["random"]["torch"])
    assert all(torch.equal(own["buffers"][name], value) for name, value in BUFFERS.items())


def test_gradients_in_accumulation_are_summed(tmp_path) -> None:
    gradient = {"up.bias": torch.randn(27)}
    path = make(tmp_path / "tag", {"outbox": gradient}, accumulated=1)
    convert(path, tmp_path / "b" / "tag")
    source = open_source(tmp_path / "b")
    assert source.facts.num_accumulated == 1 and source.facts.world == 2
    assert "gradient" in source.kinds("up.bias") and "gradient" not in source.kinds("up.weight")
    assert torch.equal(source.read("gradient", "up.bias", 0, 27), open_source(path).read("gradient", "up.bias", 0, 27))
    done = convert(path, tmp_path / "weights", to="huggingface")
    assert "gradients of 1 micro-steps in accumulation" in done.left_out


@pytest.mark.parametrize("shard_bytes", [None, 500])
def test_ours_becomes_weights_and_ours_again(tmp_path, shard_bytes) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    path = make(tmp_path / "global_step12")
    done = convert(path, tmp_path / "weights", to="huggingface", max_shard_bytes=shard_bytes)
    assert done.left_out == (
        "the optimizer's states: exp_avg, exp_avg_sq",
        "counters, settings of the optimizer, schedule, loss scale",
        "client_state",
        "masters of 16-bit parameters that are not their masters, rounded",
        "random states and the data's position",
    )
    files = sorted((tmp_path / "weights").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes is not None)
    assert json.loads((tmp_path / "weights" / "config.json").read_text()) == {"model_type": "tiny"}
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert sum(t.nbytes for t in found.values()) == done.num_bytes
    truth = values()
    exact = {**truth["master"], **truth["parameters"], "none": torch.empty(0)}
    wanted = {n: exact[n].to(facts.dtype).view(facts.shape) for n, facts in PARAMETERS.items()} | BUFFERS
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name

    back = convert(tmp_path / "weights", tmp_path / "b" / "start")
    assert back.kind == "plain weights" and back.left_out == ()
    source = open_source(tmp_path / "b")
    assert source.facts.optimizer is None and source.facts.global_steps == 0
    assert torch.equal(source.rank_state(0)["buffers"]["count"], BUFFERS["count"])
    kinds = {"master": ["scale"], "parameters": ["embed.weight", "up.weight", "up.bias", "old", "mean"]}
    assert_same(read_all(source), {k: {n: wanted[n].reshape(-1) for n in names} for k, names in kinds.items()})


def test_weights_in_another_dtype_without_frozen_ones(tmp_path) -> None:
    done = convert(make(tmp_path / "t"), tmp_path / "w", to="huggingface", dtype=torch.float16, exclude_frozen=True)
    assert done.left_out[0] == "frozen parameters: 1"
    found = load_file(tmp_path / "w" / "model.safetensors")
    assert {n for n, t in found.items() if t.dtype == torch.float16} == set(PARAMETERS) - {"old"}
    assert torch.equal(found["up.weight"], values()["master"]["up.weight"].half().view(27, 13))


def test_what_cannot_be_asked_for(tmp_path) -> None:
    path = make(tmp_path / "t")
    before = sorted(tmp_path.rglob("*"))
    for target, options, said in (
        (tmp_path / "new", {"to": "torch"}, "must be one of tritonspeed, universal, huggingface"),
        (tmp_path / "new", {"dtype": torch.float16}, "only weights are cast"),
        (tmp_path / "new", {"to": "huggingface", "dtype": torch.int8}, "a floating-point dtype"),
        (path, {}, "is there already"),
        (tmp_path / "new", {"tag": "none"}, "the tag 'none' is no checkpoint in"),
    ):
        with pytest.raises((ValueError, CorruptCheckpoint), match=said):
            convert(path, target, **options)
    with pytest.raises(ValueError, match="there is no"):
        convert(tmp_path / "nowhere", tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_one_is_found_and_nothing_is_committed(tmp_path) -> None:
    path = make(tmp_path / "t")
    file = max(path.rglob("*.master.safetensors"), key=lambda each: each.stat().st_size)
    content = bytearray(file.read_bytes())
    content[4096] ^= 1
    file.write_bytes(content)
    with pytest.raises(Exception, match="their digest does not match"):
        convert(path, tmp_path / "b" / "t")
    assert not (tmp_path / "b" / "t").exists()
    with pytest.raises(CorruptCheckpoint, match="their digest does not match"):
        convert(path, tmp_path / "w", to="huggingface")
    assert not any("w" in each.name for each in tmp_path.iterdir()), "nothing is left behind"


def test_plain_weights_keep_their_kind(tmp_path) -> None:
    save_file({"a": torch.randn(3, 2), "b": torch.randn(4).half()}, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "run" / "start")
    source = open_source(tmp_path / "run")
    assert source.kinds("a") == {"master"} and source.kinds("b") == {"parameters"}


def test_names_are_only_names(tmp_path) -> None:
    names = ["../up", "/root", "a/b", "x" * 300, "ü[0:2]", "a b", "%2e%2e", "\n"]
    save_file({name: torch.full((4,), float(i)) for i, name in enumerate(names)}, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "here" / "run" / "t")
    convert(tmp_path / "here" / "run", tmp_path / "here" / "w", to="huggingface")
    found = load_file(tmp_path / "here" / "w" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: [i] * 4 for i, n in enumerate(names)}
    with pytest.raises(ValueError, match="would be a folder of that name"):
        convert(tmp_path / "here" / "run", tmp_path / "here" / "u", to="universal")
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"run", "w"}
    assert {path.name for path in tmp_path.iterdir()} == {"here", "w.safetensors"}


def test_ours_becomes_universal_and_ours_again(tmp_path) -> None:
    told = []
    path = make(tmp_path / "global_step12", {"gradient": {"up.bias": torch.randn(27)}}, accumulated=1)
    done = convert(path, tmp_path / "u" / "step12", to="universal", on_progress=lambda *x: told.append(x))
    assert done.left_out == (
        "gradients of 1 micro-steps in accumulation",
        "values of 16-bit parameters that are not their masters, rounded",
        "random states and the data's position",
    )
    assert told[-1] == (done.num_elems, done.num_elems)
    back = convert(tmp_path / "u", tmp_path / "b" / "again")
    assert back.kind == "a universal checkpoint of DeepSpeed"
    source, truth = open_source(tmp_path / "b"), values()
    wanted = {kind: {n: t.float() for n, t in truth[kind].items()} for kind in ("master", "exp_avg", "exp_avg_sq")}
    assert_same(read_all(source), {**wanted, "parameters": {"old": truth["parameters"]["old"]}})
    assert {n: (f.shape, f.trainable, f.aliases) for n, f in source.parameters.items()} == {
        n: (f.shape, f.trainable, f.aliases) for n, f in PARAMETERS.items()
    }
    kept, run = asdict(source.facts), state_of(0)["run"]
    assert {k: kept[k] for k in ("global_steps", "global_samples", "skipped_steps", "optimizer")} == {
        k: run[k] for k in ("global_steps", "global_samples", "skipped_steps", "optimizer")
    }
    assert [group["lr"] for group in kept["param_groups"]] == [0.1, 0.2]
    assert kept["scheduler"] == run["scheduler"] and kept["client_state"] == run["client_state"]
    assert kept["num_accumulated"] == 0 and kept["scaler"]["scale"] == run["scaler"]["scale"]
    assert source.scalars("up.bias") == {"step": 11.0}
    assert all(torch.equal(source.rank_state(0)["buffers"][name], value) for name, value in BUFFERS.items())
