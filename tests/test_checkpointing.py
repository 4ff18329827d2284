"""ts.checkpointing: the same gradients as without, and what a region starts from waits in host memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import tritonspeed as ts
from tritonspeed.checkpointing import settings
from tritonspeed.checkpointing.host_inputs import REGIONS_LEAVING, HostInputs
from tritonspeed.checkpointing.torch_hook import save_through

ROWS, WIDTH, DEPTH = 6, 16, 5


@pytest.fixture
def inputs(monkeypatch):
    """Copies on the CPU, where nothing would need to be copied."""
    found = HostInputs(copies_on_cpu=True)
    monkeypatch.setattr(settings, "_inputs", found)
    ts.checkpointing.configure(checkpoint_in_cpu=True)
    yield found
    save_through(None)


@pytest.fixture(autouse=True)
def _off_again():
    yield
    save_through(None)
    ts.checkpointing.get_cuda_rng_tracker().reset()


def blocks(dropout=0.0):
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH))
        for _ in range(DEPTH)
    )


def ours(block, x):
    return ts.checkpointing.checkpoint(block, x)


def torchs(block, x):
    return torch_checkpoint(block, x, use_reentrant=False)


def torchs_reentrant(block, x):
    return torch_checkpoint(block, x, use_reentrant=True)


WAYS = [ours, torchs, torchs_reentrant]


def plain(block, x):
    return block(x)


def gradients(model, way, seed=1, x=None):
    torch.manual_seed(seed)
    start = torch.randn(ROWS, WIDTH, requires_grad=True) if x is None else x
    h = start * 1.0
    for block in model:
        h = h + way(block, h)
    h.square().mean().backward()
    found = [start.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_same_bits(inputs, way, dropout):
    model = blocks(dropout)
    with_copies = gradients(model, way)
    assert inputs.peak_host_bytes == DEPTH * ROWS * WIDTH * 4
    save_through(None)
    assert same(with_copies, gradients(model, way))
    assert same(with_copies, gradients(model, plain))


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_an_equation(inputs, way):
    model, b, alive = blocks(), ROWS * WIDTH * 4, []

    def counting(block, x):
        alive.append(weakref.ref(x.untyped_storage()))
        return way(block, x)

    h = torch.randn(ROWS, WIDTH, requires_grad=True) * 1.0
    for block in model:
        h = counting(block, h)  # nobody but the region holds its input
    gc.collect()
    held = sum(ref() is not None for ref in alive)
    assert (inputs.host_bytes, held * b) == (DEPTH * b, REGIONS_LEAVING * b)
    h.sum().backward()
    del h
    gc.collect()
    assert inputs.host_bytes == 0
    assert sum(ref() is not None for ref in alive) == 0
    assert inputs.peak_host_bytes == DEPTH * b


def test_without_it_the_device_holds_every_regions_input():
    ts.checkpointing.configure(checkpoint_in_cpu=True)  # a CPU's memory is the host's: nothing is copied
    alive, h = [], torch.randn(ROWS, WIDTH, requires_grad=True) * 1.0
    for block in blocks():
        alive.append(weakref.ref(h.untyped_storage()))
        h = ours(block, h)
    gc.collect()
    assert sum(ref() is not None for ref in alive) == DEPTH
    assert ts.checkpointing.host_bytes() == 0


def test_buffers_are_used_again_and_those_of_other_shapes_are_let_go(inputs):
    model = blocks()
    gradients(model, ours)
    places = {each.elems.data_ptr() for each in inputs._free}
    gradients(model, ours)
    assert {each.elems.data_ptr() for each in inputs._free} == places
    peak = inputs.peak_host_bytes
    for rows in (1, 2, 3, ROWS - 1):
        gradients(model, ours, x=torch.randn(rows, WIDTH, requires_grad=True))
        assert sum(each.elems.nbytes for each in inputs._free) <= peak
    assert inputs.peak_host_bytes == peak
    ts.checkpointing.reset()
    assert not inputs._free


def layouts():
    x = torch.randn(4, 6, 8)
    yield "transposed", x.transpose(1, 2)
    yield "permuted", x.permute(2, 0, 1)
    yield "with gaps", x[:, ::2, 1:5]
    yield "expanded", torch.randn(1, 6, 8).expand(4, 6, 8)
    yield "offset", torch.randn(3, 4, 6, 8)[1]
    yield "scalar", torch.randn(())
    yield "bf16", x.bfloat16()
    yield "overlapping", torch.randn(20).unfold(0, 8, 2)


@pytest.mark.parametrize(("name", "x"), [pytest.param(*each, id=each[0]) for each in layouts()])
def test_a_tensor_comes_back_with_its_values_and_strides(name, x):
    inputs = HostInputs(copies_on_cpu=True)
    packed = inputs.pack(x)
    for _ in range(REGIONS_LEAVING):
        inputs.begin_region()
    assert packed.leaving is None
    back = inputs.unpack(packed)
    assert torch.equal(back, x)
    assert (back.stride(), back.dtype) == (x.stride(), x.dtype)
    assert back.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert packed.buffer.elems.numel() <= x.numel(), "host memory holds no gap and no element twice"


def test_what_is_no_activation_stays(inputs):
    weight = nn.Parameter(torch.randn(3))
    leaf, integers, empty = torch.randn(3, requires_grad=True), torch.arange(3), torch.empty(0)
    for each in (weight, leaf, integers, empty):
        assert inputs.pack(each)[0] is each
    assert inputs.host_bytes == 0


def test_one_tensor_that_many_regions_use_crosses_once(inputs):
    model, mask = blocks(), torch.rand(ROWS, WIDTH)
    wanted = None
    for way in (ours, plain):
        torch.manual_seed(1)
        h = torch.randn(ROWS, WIDTH, requires_grad=True) * 1.0
        for block in model:
            h = ts.checkpointing.checkpoint(lambda x, m, b=block: b(x) * m, h, mask) if way is ours else block(h) * mask
        if way is ours:
            assert inputs.host_bytes == (DEPTH + 1) * ROWS * WIDTH * 4
        h.sum().backward()
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        assert wanted is None or same(found, wanted)
        wanted = found


def test_backward_twice(inputs):
    model = blocks()
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    h = x * 1.0
    for block in model:
        h = ours(block, h)
    h.sum().backward(retain_graph=True)
    first, x.grad = x.grad, None
    h.sum().backward()
    assert torch.equal(first, x.grad)


def test_a_region_in_a_region_saves_for_the_outer_one_alone(inputs):
    model = blocks(dropout=0.5)

    def outer(x):
        return ours(model[1], ours(model[0], x))

    def run(region):
        torch.manual_seed(3)
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        h = region(x * 1.0)
        held = inputs.host_bytes
        h.sum().backward()
        return held, [x.grad, *(p.grad.clone() for p in model[:2].parameters())]

    held, nested = run(lambda x: ts.checkpointing.checkpoint(outer, x))
    assert held == ROWS * WIDTH * 4
    model.zero_grad()
    _, flat = run(lambda x: model[1](model[0](x)))
    assert same(nested, flat)


def test_arguments_of_every_kind(inputs):
    weight = torch.randn(WIDTH, requires_grad=True)

    def region(x, scale, pair, *, flag, extra=None):
        assert flag == "yes"
        return x * scale * weight + pair[0] * pair[1]["deep"], None, extra

    def run(call):
        torch.manual_seed(5)
        leaves = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(3)]
        x, a, b = (each * 1.0 for each in leaves)
        out, nothing, extra = call(region, x, 2.0, (a, {"deep": b}), flag="yes", extra="kept")
        assert nothing is None
        assert extra == "kept"
        del x, a, b
        out.sum().backward()
        found = [each.grad for each in leaves] + [weight.grad]
        weight.grad = None
        return found

    with_copies = run(ts.checkpointing.checkpoint)
    assert inputs.peak_host_bytes == 3 * ROWS * WIDTH * 4
    assert same(with_copies, run(lambda f, *args, **kwargs: f(*args, **kwargs)))


def test_inputs_without_gradient_and_no_grad(inputs):
    model = blocks()
    found = gradients(model, ours, x=torch.randn(ROWS, WIDTH, requires_grad=True))
    assert all(each is not None for each in found)
    with torch.no_grad():
        ours(model[0], torch.randn(ROWS, WIDTH))
    assert inputs.host_bytes == 0
    out = ours(model[0], torch.randn(ROWS, WIDTH))  # an input that needs no gradient, before weights that do
    out.sum().backward()
    assert next(model[0].parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("way", [ours, torchs])
def test_a_write_in_place_after_the_region_is_an_error_as_in_torch(inputs, way):
    (block, *_) = blocks()
    x = torch.randn(ROWS, WIDTH, requires_grad=True) * 1.0
    out = way(block, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="written to in place"):
        out.sum().backward()


def test_somebody_elses_hooks_come_first(inputs):
    (block, *_) = blocks()
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        out = ours(block, x * 1.0)
    assert inputs.host_bytes == 0
    out.sum().backward()
    assert x.grad is not None


def test_an_error_in_a_region_leaves_no_hook_behind(inputs):
    def broken(x):
        raise KeyError("inside")

    for way in WAYS:
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        with pytest.raises(KeyError, match="inside"):
            way(broken, x * 1.0)
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_random_states_are_drawn_again_in_a_region():
    ts.checkpointing.model_parallel_cuda_manual_seed(11, model_parallel_rank=2)
    states = ts.checkpointing.get_cuda_rng_tracker()

    def region(x):
        with states.fork():
            return nn.functional.dropout(x, 0.5) * torch.rand_like(x) * x

    x = torch.ones(64, requires_grad=True)
    out = ts.checkpointing.checkpoint(region, x)
    after = states.get_states()["model-parallel-rng"].clone()
    out.sum().backward()
    assert torch.equal(states.get_states()["model-parallel-rng"], after), "backward went on drawing from it"
    assert torch.equal(x.grad, 2 * out.detach()), "d(x²·m)/dx at 1 is twice the masked value, with the same mask"


def test_random_states_are_named_and_seeded():
    states = ts.checkpointing.RandomStates()
    states.add("a", 1)
    with pytest.raises(ValueError, match="taken"):
        states.add("a", 2)
    with pytest.raises(ValueError, match="taken"):
        states.add("b", 1)
    with pytest.raises(ValueError, match="no random state is named 'c'"), states.fork("c"):
        pass
    torch.manual_seed(1)
    wanted = torch.rand(4)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with states.fork("a"):
        assert torch.equal(torch.rand(2), wanted[:2])
    with states.fork("a"):
        assert torch.equal(torch.rand(2), wanted[2:])
    assert torch.equal(torch.get_rng_state(), before)


def test_deepspeeds_names():
    outputs = []
    x = torch.randn(3, requires_grad=True)
    ts.checkpointing.CheckpointFunction.apply(lambda x: (x * 2, x + 1), outputs, x)
    assert len(outputs) == 2
    ts.checkpointing.configure(None, {"activation_checkpointing": {"partition_activations": True}})
    assert ts.checkpointing.is_configured()

    class Mpu:
        def get_model_parallel_world_size(self):
            return 2

    with pytest.raises(ValueError, match="partition_activations over a model parallel group of 2 ranks"):
        ts.checkpointing.configure(Mpu(), partition_activations=True)


GPU_ROWS, GPU_WIDTH = 2048, 1024


def on_gpu(way, in_cpu, dropout=0.1):
    """(gradients, bytes of inputs on the GPU at the end of forward, the most in backward, bytes on the host)."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = nn.ModuleList(
        nn.Sequential(nn.Linear(GPU_WIDTH, GPU_WIDTH), nn.GELU(), nn.Dropout(dropout)) for _ in range(DEPTH)
    ).to(device)
    ts.checkpointing.configure(checkpoint_in_cpu=in_cpu)
    for _ in range(3):  # the first is alone with what libraries allocate; the later ones use buffers again
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        start = torch.randn(GPU_ROWS, GPU_WIDTH, device=device, requires_grad=True)
        before = torch.cuda.memory_allocated()
        h = start * 1.0
        for block in model:
            h = way(block, h)
        held, host_bytes = torch.cuda.memory_allocated() - before, ts.checkpointing.host_bytes()
        torch.cuda.reset_peak_memory_stats()
        h.square().mean().backward()
        peak = torch.cuda.max_memory_allocated() - before
        del h
    found = [start.grad, *(p.grad for p in model.parameters())]
    return found, held, peak, host_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_on_a_gpu_inputs_leave_it_and_come_back(way):
    """Five regions' inputs of b bytes: without, five and the output are held; with, two and the output."""
    b = GPU_ROWS * GPU_WIDTH * 4
    here, away = on_gpu(way, in_cpu=False), on_gpu(way, in_cpu=True)
    assert same(here[0], away[0])
    slack = b // 8  # what is not an input: seeds, reductions, the allocator's rounding
    assert abs(here[1] - (DEPTH + 1) * b) < slack
    assert abs(away[1] - (REGIONS_LEAVING + 1) * b) < slack
    assert here[2] - away[2] >= (DEPTH - REGIONS_LEAVING - 1) * b - slack, "backward's peak is lower by those away"
    assert (here[3], away[3]) == (0, DEPTH * b)
    ts.checkpointing.reset()


@pytest.mark.gpu
def test_on_a_gpu_a_tensor_written_to_while_it_leaves_is_noticed():
    ts.checkpointing.configure(checkpoint_in_cpu=True)
    x = torch.randn(GPU_ROWS, GPU_WIDTH, device="cuda", requires_grad=True) * 1.0
    out = ts.checkpointing.checkpoint(torch.sin, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="written to in place"):
        out.sum().backward()
