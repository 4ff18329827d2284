"""Which checkpoint is meant, and what it is; what there is instead is said."""

from __future__ import annotations

import json
import random
from math import prod

import pytest
import torch
from run_of_two import make
from safetensors.torch import save_file

from tritonspeed.checkpoint import CheckpointError, CorruptCheckpoint, MismatchedCheckpoint
from tritonspeed.checkpoint.opening import DEEPSPEED, OURS, PLAIN, UNIVERSAL, kind_of, locate, open_source
from tritonspeed.checkpoint.plain import PlainWeights
from tritonspeed.checkpoint.stored import StoredCheckpoint


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).half(), "n": torch.tensor([7])},
              folder / "model.safetensors")  # fmt: skip
    return folder


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_ours_by_itself_by_latest_and_by_tag(tmp_path) -> None:
    for tag in ("global_step1", "global_step2"):
        make(tmp_path / tag)
    assert locate(tmp_path / "global_step1") == tmp_path / "global_step1"
    assert locate(tmp_path, "global_step1") == tmp_path / "global_step1"
    with pytest.raises(ValueError, match=r"no 'latest' that names one .*'global_step1', 'global_step2': name one"):
        locate(tmp_path)
    touch(tmp_path / "latest", "global_step2\n")
    assert locate(tmp_path) == tmp_path / "global_step2"
    told = []
    source = open_source(tmp_path, on_bytes=told.append)
    assert isinstance(source, StoredCheckpoint)
    source.read("master", "up.weight", 0, 27 * 13)
    assert sum(told) >= 27 * 13 * 4
    touch(tmp_path / "latest", "global_step3")
    with pytest.raises(
        CorruptCheckpoint, match="names 'global_step3', which is no checkpoint .*there is no such folder"
    ):
        locate(tmp_path)
    with pytest.raises(ValueError, match="must be a plain name"):
        locate(tmp_path, "../other")


def test_one_whose_save_died_between_two_renamings(tmp_path) -> None:
    make(tmp_path / ".global_step12.0123456789abcdef")
    touch(tmp_path / "latest", "global_step12")
    assert locate(tmp_path).name == ".global_step12.0123456789abcdef"
    assert open_source(tmp_path, verify="sampled").facts.global_steps == 12


def test_deepspeeds_are_told_by_their_files(tmp_path) -> None:
    touch(tmp_path / "global_step5" / "mp_rank_00_model_states.pt")
    touch(tmp_path / "global_step5" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    touch(tmp_path / "latest", "global_step5")
    touch(tmp_path / "global_step5_universal" / "zero" / "a.weight" / "fp32.pt")
    touch(tmp_path / "global_step5_universal" / "mp_rank_00_model_states.pt")
    assert kind_of(locate(tmp_path)) == DEEPSPEED
    assert kind_of(locate(tmp_path, "global_step5_universal")) == UNIVERSAL
    (tmp_path / "latest").unlink()
    touch(tmp_path / "latest_universal", "global_step5_universal")
    assert kind_of(locate(tmp_path)) == UNIVERSAL
    with pytest.raises(CheckpointError):
        open_source(tmp_path, "global_step5")  # its files are empty


def test_weights_beside_checkpoints_give_way_to_them(tmp_path, weights) -> None:
    assert kind_of(weights) == PLAIN and isinstance(open_source(weights), PlainWeights)
    assert isinstance(open_source(weights / "model.safetensors"), PlainWeights)
    make(weights / "global_step1")
    assert kind_of(locate(weights)) == PLAIN
    touch(weights / "latest", "global_step1")
    assert kind_of(locate(weights)) == OURS


def test_what_is_no_checkpoint(tmp_path) -> None:
    with pytest.raises(ValueError, match="there is no .*nowhere"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no checkpoint: it has nothing. Expected is"):
        open_source(tmp_path)
    touch(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="it has 'notes.txt'"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="name a folder, or a .safetensors file"):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="weights is pickle, which is not read"):
        open_source(touch(tmp_path / "pytorch_model.bin"))


def test_plain_weights_as_a_source(weights) -> None:
    source = PlainWeights(weights)
    assert {n: (f.shape, f.dtype, f.trainable) for n, f in source.parameters.items()} == {
        "a": ((2, 3), torch.float32, True), "b": ((4,), torch.float16, True),
    }  # fmt: skip
    assert source.kinds("a") == {"master"} and source.kinds("b") == {"parameters"}
    assert torch.equal(source.read("master", "a", 2, 5), torch.arange(2.0, 5.0))
    assert source.read("parameters", "b", 1, 1).numel() == 0
    assert torch.equal(source.rank_state(3)["buffers"]["n"], torch.tensor([7]))
    assert source.scalars("a") == {} and source.read_own("outbox", 0, "a", 0, 1) is None
    assert source.facts.optimizer is None and source.facts.global_steps == 0
    for call, said in (
        (lambda: source.kinds("n"), "no parameter 'n'"),
        (lambda: source.read("exp_avg", "a", 0, 1), "no exp_avg of 'a': these are weights alone"),
    ):
        with pytest.raises(MismatchedCheckpoint, match=said):
            call()
    with pytest.raises(ValueError, match=r"\[4, 7\) of 'a', which has 6 elements"):
        source.read("master", "a", 4, 7)
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(CorruptCheckpoint, match="has become shorter"):
        source.read("parameters", "b", 0, 4)
    with pytest.raises(CorruptCheckpoint, match="damaged or cut short"):
        PlainWeights(weights)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        [[[]]],
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused(tmp_path, entry) -> None:
    text = json.dumps({"a": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CorruptCheckpoint, match="model.safetensors"):
        open_source(tmp_path)
    deep = b"[" * 200_000
    file.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(CorruptCheckpoint, match="its header cannot be read"):
        open_source(file)


def test_thousands_of_damaged_files_are_refused_or_read(weights, tmp_path) -> None:
    """Whatever the bytes: CorruptCheckpoint, or tensors of the sizes that are said; nothing else and no crash."""
    rng, whole = random.Random(0), (weights / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    file, refused = tmp_path / "model.safetensors", 0
    words = [b"-1", b"1e9", b"NaN", b"null", b"[]", b"{}", b'"', b"9" * 30, b"../x", b"\\u0000", b"F64", b"true"]
    for _ in range(3000):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(length)
            change = rng.randrange(4)
            if change == 0:
                content[at] = rng.randrange(256)
            elif change == 1:
                word = rng.choice(words)
                content[at : at + len(word)] = word
            elif change == 2:
                del content[at : at + rng.randrange(1, 9)]
            else:
                content[at:at] = rng.choice(words)
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        file.unlink(missing_ok=True)  # a new one: to write over a file takes 4 ms
        file.write_bytes(content)
        try:
            source = PlainWeights(file)
            for name, facts in source.parameters.items():
                (kind,) = source.kinds(name)
                assert source.read(kind, name, 0, prod(facts.shape)).numel() == prod(facts.shape)
            assert all(isinstance(b, torch.Tensor) for b in source.rank_state(0).get("buffers", {}).values())
        except CorruptCheckpoint:
            refused += 1
    assert refused > 1500
