"""What a forward and backward hold, found on shapes alone, against the true run: operation by operation, and as
PyTorch's CPU allocator saw it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tritonspeed as ts
from tritonspeed.estimation import activation_bytes
from tritonspeed.estimation.activations import Meter, measure_activations

RNG_BYTES = 16 * 1024  # the generator's state, which checkpoint keeps per block and no operation makes
SCRATCH_BYTES = 128 * 1024  # scratch of single kernels: bf16 products of small matrices


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    """Attention through sdpa, tied head, cross-entropy; recomputed or not."""

    def __init__(self, recompute: str | None = None, vocab: int = 997, width: int = 96) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.register_buffer("scale", torch.ones(1000))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.recompute == "reentrant") if self.recompute else block(x)
        return F.cross_entropy(F.linear(x, self.embed.weight).flatten(0, 1).float(), targets.flatten())


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def tokens(rows: int = 3, length: int = 64) -> tuple[Tensor, Tensor]:
    return torch.randint(997, (rows, length)), torch.randint(997, (rows, length))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(211, 300), nn.GELU(), nn.Linear(300, 1)),
        lambda: (torch.randn(1000, 211),),
    ),
    "transformer": (Transformer, tokens),
    "transformer recomputed": (lambda: Transformer("plain"), tokens),
    "transformer recomputed, reentrant": (lambda: Transformer("reentrant"), tokens),
    "net": (lambda: Net(997, 64), tokens),
    "net tied, recomputed": (lambda: Net(997, 64, tied=True, recompute="plain"), tokens),
    "images": (Images, lambda: (torch.randn(5, 3, 40, 40),)),
}


def step_of(inputs: tuple[Tensor, ...]) -> Callable[[nn.Module], Tensor]:
    def step(model: nn.Module) -> Tensor:
        out = model(*inputs)
        return out if out.ndim == 0 else out.sum()

    return step


def allocated_peak_bytes(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> int:
    """The most that PyTorch's CPU allocator held over one forward and backward, as its profiler saw it."""

    def take(p: Tensor) -> None:
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(take)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(model).backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live_bytes = peak_bytes = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live_bytes += event.nbytes()
        peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_alone_hold_what_the_true_run_holds(name, dtype):
    build, make = MODELS[name]
    model, inputs = build(), tuple(t.to(dtype) if t.is_floating_point() else t for t in make())
    on_paper = measure_activations(model, inputs, dtype)
    model = model.to(dtype)
    assert on_paper == Meter(model).run(step_of(inputs))  # every operation of it, with real tensors

    ours = sum(t.nbytes for t in [*inputs, *model.buffers()])  # held before, so the profiler has not seen them
    seen = allocated_peak_bytes(model, step_of(inputs)) + ours
    blocks = len(getattr(model, "blocks", ())) if getattr(model, "recompute", None) else 0
    assert seen <= on_paper.peak_bytes + blocks * RNG_BYTES + SCRATCH_BYTES
    assert on_paper.peak_bytes - on_paper.at_peak.get("scratch", 0) <= 1.3 * seen


def test_recomputation_follows_by_itself():
    args = tokens()
    kept, plain, reentrant = (activation_bytes(Transformer(mode), args) for mode in (None, "plain", "reentrant"))
    assert plain < 0.7 * kept
    assert plain == pytest.approx(reentrant, rel=0.01)


def test_the_peak_is_told_by_block():
    found = measure_activations(Transformer(), tokens())
    assert sum(found.at_peak.values()) == found.peak_bytes == max(found.forward_bytes, found.backward_bytes)
    assert found.at_peak["blocks.0"] == found.at_peak["blocks.1"] > 0
    assert found.at_peak["buffers"] == 4000
    assert found.at_peak["inputs"] == 2 * 3 * 64 * 8
    assert found.saved_bytes <= found.forward_bytes


def test_nothing_is_allocated_and_the_model_is_left_as_it_is():
    model = Net(vocab=50_000, width=256, depth=2).eval()
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    inputs = torch.randint(50_000, (64, 512)), torch.randint(50_000, (64, 512))  # logits of 6.5 GB, twice
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = activation_bytes(model, inputs)
    assert found > 64 * 512 * 50_000 * 4 * 2
    assert sum(max(0, e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]") < 2**20
    assert before == {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_of_every_kind():
    args = tokens()
    by_position = activation_bytes(Transformer(), args)
    assert by_position == activation_bytes(Transformer(), dict(zip(("tokens", "targets"), args, strict=True)))
    assert by_position == activation_bytes(Transformer(), lambda model: model(*args))
    on_meta = [t.to("meta") for t in args]
    with torch.device("meta"):
        model = Transformer()
    assert by_position == activation_bytes(model, on_meta)


def test_a_model_built_under_init_counts_as_any_other():
    with ts.zero.Init():
        model = Net(101, 16)
    inputs = torch.randint(101, (2, 9)), torch.randint(101, (2, 9))
    assert activation_bytes(model, inputs) == activation_bytes(Net(101, 16), inputs)


def test_autocast_holds_casts_of_the_weights():
    args = tokens()
    plain, cast = activation_bytes(Net(997, 64), args), activation_bytes(Net(997, 64), args, autocast=torch.bfloat16)
    assert plain != cast
    model, step = Net(997, 64), step_of(args)
    assert cast == Meter(model).run(step, torch.bfloat16).peak_bytes


def test_our_own_operations_take_room_within_themselves():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 5000)

        def forward(self, x: Tensor, targets: Tensor) -> Tensor:
            return ts.kernels.cross_entropy(self.head(x), targets)

    model, inputs = Head().bfloat16(), (torch.randn(200, 32).bfloat16(), torch.randint(5000, (200,)))
    seen = allocated_peak_bytes(model, step_of(inputs))
    found = measure_activations(model, inputs)
    assert seen <= found.peak_bytes <= 2.5 * seen


def test_a_path_that_depends_on_values_is_refused():
    class Choosy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="depends on values"):
        activation_bytes(Choosy(3, 3), torch.randn(2, 3))
