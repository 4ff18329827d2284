"""What real DeepSpeed has saved is read to the last bit: every stage, precision and layout that it has."""

from __future__ import annotations

import shutil
import struct
import zipfile
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_fixture import Made, unpack
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.peers.deepspeed_checkpoints import PACKED, STEPS, groups
from bench.peers.deepspeed_checkpoints import Tiny as TinyModel
from tritonspeed.checkpoint import CorruptCheckpoint, MismatchedCheckpoint, Source
from tritonspeed.checkpoint.deepspeed.files import DeepSpeedCheckpoint
from tritonspeed.checkpoint.deepspeed.layout import Layout, flat_layout, sharded_layout
from tritonspeed.checkpoint.deepspeed.universal import UniversalCheckpoint, write_universal

TWICE = ["stage0-bf16"]  # DeepSpeed's stage 0 takes one step with zero gradients before the first


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("deepspeed"))


def truth_of(case: Made) -> dict[tuple[str, str], torch.Tensor]:
    """What must be read. Under round-robin gradients DeepSpeed's own accessors mistake one parameter for another, and
    what is true is what the weights are roundings of; of its Adagrad, the name of the state is ours; its Lion keeps
    zeros that nothing uses."""
    values = case.values()
    if "robin" in case.name:
        return {key: value for key, value in values.items() if key[0] == "parameters"}
    if "lion" in case.name:
        return {key: value for key, value in values.items() if key[0] != "exp_avg_sq"}
    if "adagrad" in case.name:
        return {("sum" if kind == "exp_avg_sq" else kind, name): v for (kind, name), v in values.items()}
    return values


@pytest.mark.parametrize("name", PACKED)
def test_every_value_is_read_bit_by_bit(made: Path, name: str):
    case = Made(made / name)
    source = case.open()
    values = truth_of(case)
    for (kind, parameter), want in values.items():
        got = source.read(kind, parameter, 0, want.numel())
        assert got.dtype == want.dtype and torch.equal(got.view(want.shape), want), (kind, parameter)
        assert source.parameters[parameter].shape == tuple(want.shape)
        assert source.parameters[parameter].trainable == (kind != "parameters")
    read = {(kind, parameter) for parameter in source.parameters for kind in source.kinds(parameter)}
    if "robin" not in name:
        assert read == set(values)
    buffers = source.rank_state(0)["buffers"]
    assert set(buffers) == {"scale"} and torch.equal(buffers["scale"], case.truth["buffer|scale"])
    assert source.rank_state(1) == {} and source.read_own("outbox", 0, "gain", 0, 5) is None
    source.close()


def test_masters_under_round_robin_gradients_are_those_of_the_weights(made: Path):
    case = Made(made / "stage2-bf16-robin")
    source = case.open()
    module = torch.load(case.path / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    differs = []
    for name, facts in source.parameters.items():
        if facts.trainable:
            master = source.read("master", name, 0, prod(facts.shape)).view(facts.shape)
            assert torch.equal(master.bfloat16(), module[name]), name
            differs.append(not torch.equal(master, case.truth[f"master|{name}"]))
    assert any(differs)  # else DeepSpeed has mended its mapping, and this case may go


@pytest.mark.parametrize("name", PACKED)
def test_parts_are_the_parts_of_the_whole(made: Path, name: str):
    case = Made(made / name)
    source, cut = case.open(), torch.Generator().manual_seed(3)
    for (kind, parameter), want in truth_of(case).items():
        for _ in range(6):
            lo, hi = sorted(torch.randint(0, want.numel() + 1, (2,), generator=cut).tolist())
            assert torch.equal(source.read(kind, parameter, lo, hi), want.flatten()[lo:hi]), (kind, parameter, lo, hi)


@pytest.mark.parametrize("name", PACKED)
def test_the_run_is_known(made: Path, name: str):
    case = Made(made / name)
    source, facts = case.open(), case.open().facts
    world = case.truth["batches"].shape[1]
    assert (facts.global_steps, facts.global_samples, facts.skipped_steps) == (STEPS, STEPS * 2 * world, 0)
    assert (facts.world, facts.accumulation, facts.micro_batch, facts.num_accumulated) == (world, 1, 2, 0)
    assert facts.optimizer == case.facts["config"]["optimizer"]["type"]
    assert facts.scheduler == case.facts["scheduler"]
    assert facts.client_state == {"epoch": 4, "note": "seen"}
    if case.facts["scale"] is not None:
        assert facts.scaler is not None and facts.scaler["dynamic"] and facts.scaler["scale"] == case.facts["scale"]
        assert (facts.scaler["num_updates"], facts.scaler["last_overflow"]) == (STEPS, -1)
    steps = {source.scalars(p).get("step") for p, each in source.parameters.items() if each.trainable}
    assert steps == {None if "sgd" in name else STEPS + (name in TWICE)}
    tied = source.parameters["embedding.weight"]
    assert tied.aliases == ("head.weight",) and "head.weight" not in source.parameters
    config = case.facts["config"]
    precision = torch.float16 if "fp16" in config else torch.bfloat16 if "bf16" in config else torch.float32
    assert tied.dtype == source.parameters["positions"].dtype == precision


@pytest.mark.parametrize("name", [name for name in PACKED if "elastic" not in name])
def test_settings_come_with_the_names_of_their_parameters(made: Path, name: str):
    found = Made(made / name).open().facts.param_groups
    model = TinyModel()
    names = {id(p): n for n, p in model.named_parameters()}
    wanted = [[names[id(p)] for p in group["params"]] for group in groups(model)]
    assert [sorted(group["params"]) for group in found] == [sorted(each) for each in wanted]
    assert [group["weight_decay"] for group in found] == [0.1, 0.0]
    assert all("step" not in group for group in found)


# what is refused


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Any:
    """A case to spoil: its tag's folder."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(Made(made / name).path, tmp_path / name))

    return copy


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("stage2-fp16", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "optim_states.pt of 1 ranks|zero_pp_rank_1_"),
        ("stage2-fp32-three", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states"),
        ("stage2-fp32-three", "zero_pp_rank_2_mp_rank_00_optim_states.pt", "zero_pp_rank_2_mp_rank_00_optim_states"),
        ("stage1-bf16", "mp_rank_00_model_states.pt", "no model_states.pt of rank 0"),
        ("stage3-bf16-four", "zero_pp_rank_2_mp_rank_00_model_states.pt", "zero_pp_rank_2_mp_rank_00_model_states"),
        ("stage3-bf16-four", "zero_pp_rank_0_mp_rank_00_model_states.pt", "no model_states.pt of rank 0"),
        ("stage3-bf16", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states"),
        ("stage3-bf16-universal", "zero/gain/exp_avg.pt", None),
        ("stage3-bf16-universal", "zero/gain/fp32.pt", "gain.* has no fp32.pt"),
        ("stage3-bf16-universal", "zero/optimizer_state.pt", "optimizer_state.pt is missing"),
        ("stage2-fp16-universal", "mp_rank_00_model_states.pt", "neither mp_rank_00_model_states.pt nor"),
    ],
)
def test_a_missing_file_is_named(copied: Any, name: str, file: str, said: str | None):
    path = copied(name)
    (path / file).unlink()
    kind = UniversalCheckpoint if "universal" in name else DeepSpeedCheckpoint
    if said is None:
        assert "exp_avg" not in kind(path).kinds("gain")  # whoever restores says that it is absent
        return
    with pytest.raises(CorruptCheckpoint, match=said):
        kind(path)


def test_no_ranks_file_at_all(copied: Any):
    path = copied("stage2-fp16")
    for file in path.glob("*_optim_states.pt"):
        file.unlink()
    with pytest.raises(CorruptCheckpoint, match="not one of the 2 ranks"):
        DeepSpeedCheckpoint(path)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("mp_rank_01_model_states.pt", "tensor-parallel training, part 1"),
        ("bf16_zero_pp_rank_0_mp_rank_03_optim_states.pt", "tensor-parallel training, part 3"),
        ("layer_00-model_states.pt", "pipeline-parallel"),
        ("layer_2_expert_0_mp_rank_00_model_states.pt", "experts"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts"),
        ("offloaded_tensors/rank00", "NVMe.*offload_optimizer on cpu"),
    ],
)
def test_parallelism_that_is_not_read_is_named(copied: Any, file: str, said: str):
    path = copied("stage1-bf16")
    (path / file).parent.mkdir(exist_ok=True)
    (path / file).touch()
    with pytest.raises(MismatchedCheckpoint, match=said):
        DeepSpeedCheckpoint(path)


def test_models_of_two_runs_in_one_tag(made: Path, copied: Any):
    path = copied("stage3-bf16")
    shutil.copy(Made(made / "stage1-bf16").path / "mp_rank_00_model_states.pt", path)
    with pytest.raises(CorruptCheckpoint, match="of two runs"):
        DeepSpeedCheckpoint(path)


def test_a_rank_of_a_number_beyond_all(copied: Any):
    path = copied("stage1-bf16")
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (path / name).rename(path / name.replace("rank_1_", "rank_9999999_"))
    with pytest.raises(CorruptCheckpoint, match=r"9,999,998 ranks are missing, such as zero_pp_rank_1_"):
        DeepSpeedCheckpoint(path)


def test_no_folder_at_all(tmp_path: Path):
    for kind in (DeepSpeedCheckpoint, UniversalCheckpoint):
        with pytest.raises(CorruptCheckpoint, match="nowhere"):
            kind(tmp_path / "nowhere")


def test_files_of_two_runs_in_one_tag(copied: Any):
    path = copied("stage1-bf16")
    for file in list(path.glob("bf16_*")):
        shutil.copy(file, path / file.name.removeprefix("bf16_"))
    with pytest.raises(CorruptCheckpoint, match="of two runs"):
        DeepSpeedCheckpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "error", "said"),
    [
        ("mp_world_size", 2, MismatchedCheckpoint, "model-parallel"),
        ("checkpoint_parallel_dimensions", {"pp_degree": 4}, MismatchedCheckpoint, "pipeline-parallel.*4"),
        ("num_experts", [8], MismatchedCheckpoint, "experts"),
        ("module", None, MismatchedCheckpoint, "files of their own"),
        ("dp_world_size", 3, CorruptCheckpoint, "zero_pp_rank_2_mp_rank_00_optim_states"),
        ("dp_world_size", -1, CorruptCheckpoint, "dp_world_size is -1"),
        ("dp_world_size", 2**40, CorruptCheckpoint, "dp_world_size is 1099511627776"),
        ("dp_world_size", 2**20, CorruptCheckpoint, "1,048,574 ranks are missing, such as zero_pp_rank_2_"),
        ("global_steps", 3.5, CorruptCheckpoint, "global_steps is 3.5"),
        ("param_shapes", [{"a": torch.Size([2, 2**60])}], CorruptCheckpoint, "elements of 'a'|size of 'a'"),
        ("param_shapes", [{"a": (-3, 4)}], CorruptCheckpoint, "a size of 'a' is -3"),
        ("param_shapes", [{"a": (float("nan"),)}], CorruptCheckpoint, "a size of 'a' is nan"),
        ("param_shapes", [{"a": torch.Size([3])}, {"a": torch.Size([3])}], CorruptCheckpoint, "twice"),
        ("param_shapes", [{"a": torch.Size([3])}], CorruptCheckpoint, "group"),
        ("param_shapes", 7, CorruptCheckpoint, "param_shapes is a int"),
        ("shared_params", {"head.weight": 3}, CorruptCheckpoint, "no parameter's name"),
        ("buffer_names", 5, CorruptCheckpoint, "int"),
    ],
)
def test_a_model_file_that_says_nonsense(copied: Any, key: str, value: Any, error: type[Exception], said: str):
    path = copied("stage2-fp16")
    file = path / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(file, weights_only=True), key: value}, file)
    with pytest.raises(error, match=said):
        DeepSpeedCheckpoint(path)


@pytest.mark.parametrize("name", ["stage2-fp32-three", "stage3-bf16-four", "stage3-bf16-universal"])
def test_a_flipped_byte_of_a_tensor_is_found_when_it_is_read(copied: Any, name: str):
    path = copied(name)
    universal = "universal" in name
    file = path / "zero/blocks.0.up.weight/fp32.pt" if universal else next(path.glob("*rank_1_*optim_states.pt"))
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        member = next(each for each in archive.infolist() if each.filename.endswith("/data/0"))
    place = member.header_offset + 30 + sum(struct.unpack_from("<HH", content, member.header_offset + 26)) + 5
    content[place] ^= 4
    file.write_bytes(content)
    kind = UniversalCheckpoint if universal else DeepSpeedCheckpoint
    source = kind(path)  # of rank 1 nothing has been opened yet
    with pytest.raises(CorruptCheckpoint, match=file.name):
        read_all(source)
    read_all(kind(path, verify="none"))


def read_all(source: Source) -> None:
    for parameter, facts in source.parameters.items():
        for kind in sorted(source.kinds(parameter)):
            source.read(kind, parameter, 0, prod(facts.shape))


# where each element is


Sizes = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), min_size=1, max_size=3)


def named(sizes: list[list[int]]) -> list[dict[str, tuple[int, ...]]]:
    return [{f"{i}.{j}": (n,) for j, n in enumerate(each)} for i, each in enumerate(sizes)]


def gathered(layout: Layout, flats: dict[tuple[int, int], list[int]], name: str, lo: int, hi: int) -> list[int]:
    found = []
    for e in layout.places[name].extents(lo, hi):
        part = flats[e.rank, e.flat][e.start : e.start + e.hi - e.lo]
        assert len(part) == e.hi - e.lo and e.lo == lo + len(found)
        found += part
    return found


@settings(max_examples=60, deadline=None)
@given(sizes=Sizes, world=st.integers(1, 7), data=st.data())
def test_places_in_flats_of_stages_1_and_2(sizes: list[list[int]], world: int, data: st.DataObject):
    """Parameters end to end, gaps between, filled up to a multiple of 2 · world, dealt out in equal parts."""
    gaps = [[data.draw(st.integers(0, 3)) for _ in each[:-1]] + [0] for each in sizes]
    layout = flat_layout(named(sizes), gaps, world)
    flats: dict[tuple[int, int], list[int]] = {}
    values: dict[str, list[int]] = {}
    for i, each in enumerate(sizes):
        whole: list[int] = []
        for j, numel in enumerate(each):
            values[f"{i}.{j}"] = list(range(1000 * j, 1000 * j + numel))
            whole += values[f"{i}.{j}"] + [-1] * gaps[i][j]
        lean = len(whole)
        whole += [-1] * (-len(whole) % (2 * world))
        share = len(whole) // world
        for rank in range(world):
            flats[rank, i] = whole[rank * share : (rank + 1) * share]
            assert layout.sizes(rank, i) == (share, min(max(0, lean - rank * share), share))
    for name, want in values.items():
        lo = data.draw(st.integers(0, len(want)))
        hi = data.draw(st.integers(lo, len(want)))
        assert gathered(layout, flats, name, lo, hi) == want[lo:hi]


@settings(max_examples=60, deadline=None)
@given(sizes=Sizes, world=st.integers(1, 7), data=st.data())
def test_places_in_flats_of_stage_3(sizes: list[list[int]], world: int, data: st.DataObject):
    """Each parameter dealt out in equal parts, the last ones filled up; a rank's parts end to end."""
    layout = sharded_layout(named(sizes), world)
    flats: dict[tuple[int, int], list[int]] = {(r, i): [] for r in range(world) for i in range(len(sizes))}
    values: dict[str, list[int]] = {}
    for i, each in enumerate(sizes):
        for j, numel in enumerate(each):
            want = values[f"{i}.{j}"] = list(range(1000 * j, 1000 * j + numel))
            share = ceil(numel / world)
            filled = want + [-1] * (share * world - numel)
            for rank in range(world):
                flats[rank, i] += filled[rank * share : (rank + 1) * share]
    for rank, flat in flats:
        assert set(layout.sizes(rank, flat)) == {len(flats[rank, flat])}
    for name, want in values.items():
        lo = data.draw(st.integers(0, len(want)))
        hi = data.draw(st.integers(lo, len(want)))
        assert gathered(layout, flats, name, lo, hi) == want[lo:hi]


# the universal format, written


@pytest.mark.parametrize("name", ["stage0-bf16", "stage2-fp16", "stage2-fp32-sgd", "stage3-bf16-four"])
def test_a_universal_folder_has_what_its_source_has(made: Path, tmp_path: Path, name: str):
    source = Made(made / name).open()
    write_universal(source, tmp_path / "global_step3_universal")
    assert (tmp_path / "latest_universal").read_text() == "global_step3_universal"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step3_universal", "latest_universal"]
    again = UniversalCheckpoint(tmp_path / "global_step3_universal")
    assert again.parameters == source.parameters
    assert again.facts == source.facts
    for parameter, facts in source.parameters.items():
        assert again.kinds(parameter) == source.kinds(parameter)
        if source.scalars(parameter):  # SGD counts no steps, and DeepSpeed's stage 3 asks for them
            assert again.scalars(parameter) == source.scalars(parameter)
        for kind in source.kinds(parameter):
            one, other = (each.read(kind, parameter, 0, prod(facts.shape)) for each in (source, again))
            assert one.dtype == other.dtype and torch.equal(one, other), (parameter, kind)
    assert torch.equal(again.rank_state(0)["buffers"]["scale"], source.rank_state(0)["buffers"]["scale"])


def test_nothing_is_overwritten(made: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        write_universal(Made(made / "stage2-fp16").open(), tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"] and (tmp_path / "taken/file").read_text() == "mine"
