"""AdamW on any number of tensors of any sizes in one launch: the kernel finds them through a table of addresses.

The maths is that of ``adamw.py``, whose tile it runs; an element's result is the same to the last bit.

    fixed    int64 [7, T]       master, exp_avg, exp_avg_sq, out (0: none), numel, place · 2⁶⁴/φ, row of each tensor
    chunks   int32 [2, C]       tensor and number of each chunk of ``chunk`` elements, one a program; full ones first
    moving   int64 [8 · R + T]  R rows of scalars, then the addresses of the gradients: all that a step uploads

A row is what tensors of one group and one step count share: the nine coefficients in fp32, seed and step in int64. So
neither a schedule nor tensors of different groups take another launch, or another kernel.

Shapes   any; each tensor contiguous
Types    as in ``adamw.py``, one set of types in a table
Bytes    those of ``adamw.py`` for every tensor; 16 bytes wide where all of a tensor's addresses are multiples of 16
Source   the table: apex's multi_tensor_apply, which packs it into the kernel's arguments and so needs many launches
Roof     not measured yet. Host: bench/kernels/bench_multi_tensor.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritonspeed.kernels._triton import INTERPRETED, card_of, launch, on_device_of, tl, triton
from tritonspeed.kernels.adamw import AdamWStep, _adamw_tile
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.tuned import Tunable, dtype_name

ROW_WORDS = 8  # int64 words of a row: nine fp32 in words 0 to 4, then seed and step
SEED_WORD, STEP_WORD = 5, 6
_NUM_FIXED = 7
PLACE_STEP = 0x9E3779B97F4A7C15  # 2⁶⁴ over the golden ratio: neighbouring places land far apart
_MIX = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
_WORD = 0xFFFFFFFFFFFFFFFF


def mixed_seed(seed: int, place: int, step: int) -> int:
    """One 63-bit seed per tensor and step: neighbouring ones share no bits (the finaliser of MurmurHash3)."""
    x = (seed + place * PLACE_STEP + (step << 32)) & _WORD
    for multiplier in _MIX:
        x = ((x ^ (x >> 33)) * multiplier) & _WORD
    return (x ^ (x >> 33)) >> 1


def _signed(x: int) -> int:
    """The int64 of the same 64 bits."""
    x &= _WORD
    return x - 2**64 if x >= 2**63 else x


@triton.jit
def _mixed_seed(seed, place, step):
    """``mixed_seed`` in int64, whose products wrap as they should; ``place`` is already multiplied."""
    x = seed + place + (step << 32)
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * -49064778989728563  # the two of _MIX, as int64
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * -4265267296055464877
    return ((x ^ ((x >> 33) & 0x7FFFFFFF)) >> 1) & 0x7FFFFFFFFFFFFFFF


@triton.jit(do_not_specialize=["num_tensors", "num_chunks", "num_rows"])
def _multi_tensor_adamw_kernel(
    fixed_ptr, chunks_ptr, moving_ptr, rows_ptr, scale_ptr, found_inf_ptr, num_tensors, num_chunks, num_rows,
    STATE: tl.constexpr, GRAD: tl.constexpr, OUT: tl.constexpr, DECOUPLED: tl.constexpr, RANDOM: tl.constexpr,
    RANDOM_STATE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:  # noqa: SIM102 — this test is the compiler's, the next one the GPU's
        if tl.load(found_inf_ptr) != 0.0:
            return
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    program = tl.program_id(0)
    tensor = tl.load(chunks_ptr + program)
    start = tl.load(chunks_ptr + num_chunks + program).to(tl.int64) * CHUNK  # int64: a tensor may pass 2³¹ elements
    master = tl.load(fixed_ptr + tensor)
    exp_avg = tl.load(fixed_ptr + num_tensors + tensor)
    exp_avg_sq = tl.load(fixed_ptr + 2 * num_tensors + tensor)
    out = tl.load(fixed_ptr + 3 * num_tensors + tensor)
    num_left = tl.load(fixed_ptr + 4 * num_tensors + tensor) - start
    place = tl.load(fixed_ptr + 5 * num_tensors + tensor)
    row = tl.load(fixed_ptr + 6 * num_tensors + tensor)
    grad = tl.load(moving_ptr + 8 * num_rows + tensor)

    at = rows_ptr + row * 16  # fp32 words
    beta1, one_minus_beta1, beta2, one_minus_beta2 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    eps, weight_decay, decay = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
    step_size, inverse_root_c2 = tl.load(at + 7), tl.load(at + 8)
    given_seed, step = tl.load(moving_ptr + row * 8 + 5), tl.load(moving_ptr + row * 8 + 6)
    mixed = _mixed_seed(given_seed, place, step)

    # cast here and not in a helper: triton 3.6 to 3.8 lose the hints below on what a call returned, and load scalars
    STATE_BYTES: tl.constexpr = STATE.primitive_bitwidth // 8  # pyrefly: ignore[missing-attribute]
    master_ptr = (master + start * 4).to(tl.pointer_type(tl.float32))
    exp_avg_ptr = (exp_avg + start * STATE_BYTES).to(tl.pointer_type(STATE))  # pyrefly: ignore[bad-argument-type]
    exp_avg_sq_ptr = (exp_avg_sq + start * STATE_BYTES).to(tl.pointer_type(STATE))  # pyrefly: ignore[bad-argument-type]
    GRAD_BYTES: tl.constexpr = GRAD.primitive_bitwidth // 8  # pyrefly: ignore[missing-attribute]
    grad_ptr = (grad + start * GRAD_BYTES).to(tl.pointer_type(GRAD))  # pyrefly: ignore[bad-argument-type]
    out_ptr = None
    if OUT is not None:
        OUT_BYTES: tl.constexpr = OUT.primitive_bitwidth // 8  # pyrefly: ignore[missing-attribute]
        out_ptr = (out + start * OUT_BYTES).to(tl.pointer_type(OUT))  # pyrefly: ignore[bad-argument-type]

    offsets = tl.arange(0, BLOCK)
    here = tl.minimum(num_left, CHUNK).to(tl.int32)
    num_wide = here // BLOCK
    # nothing is known of an address from a table, so that its loads would be scalar: tested here, once a chunk
    if ((master | exp_avg | exp_avg_sq | grad | out) & 15) != 0:
        num_wide = 0
    for tile in range(num_wide):
        first = tile * BLOCK
        # 0, which the compiler cannot know: it would work out philox's keys before the loop, and 12 scalars more spill
        # on gfx90a and gfx942. One seed for both, which take other halves of its words: they are drawn once.
        here_mixed = mixed ^ (tile >> 20)
        seed, state_seed = None, None
        if RANDOM:
            seed = here_mixed
        if RANDOM_STATE:
            state_seed = here_mixed
        wide_out_ptr = None
        if OUT is not None:
            wide_out_ptr = tl.multiple_of(out_ptr, 16) + first
        _adamw_tile(
            tl.multiple_of(master_ptr, 16) + first, tl.multiple_of(exp_avg_ptr, 16) + first,
            tl.multiple_of(exp_avg_sq_ptr, 16) + first, tl.multiple_of(grad_ptr, 16) + first, wide_out_ptr,
            scale, offsets, None, seed, state_seed, start + first,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size, inverse_root_c2,
            DECOUPLED, BLOCK, INTERPRET,
        )  # fmt: skip
    for tile in range(num_wide, tl.cdiv(here, BLOCK)):
        first = tile * BLOCK
        # 0, which the compiler cannot know: it would work out philox's keys before the loop, and 12 scalars more spill
        # on gfx90a and gfx942. One seed for both, which take other halves of its words: they are drawn once.
        here_mixed = mixed ^ (tile >> 20)
        seed, state_seed = None, None
        if RANDOM:
            seed = here_mixed
        if RANDOM_STATE:
            state_seed = here_mixed
        tail_out_ptr = None
        if OUT is not None:
            tail_out_ptr = out_ptr + first
        _adamw_tile(
            master_ptr + first, exp_avg_ptr + first, exp_avg_sq_ptr + first, grad_ptr + first, tail_out_ptr,
            scale, offsets, offsets < here - first, seed, state_seed, start + first,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size, inverse_root_c2,
            DECOUPLED, BLOCK, INTERPRET,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MultiTensorLaunch:
    """How the kernel is launched; ``chunk`` is what one program updates, a multiple of ``block``."""

    chunk: int
    block: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card) -> "MultiTensorLaunch":
        # as AdamWLaunch: 256 threads × 4 elements. 64 Ki elements are 64 tiles: the dozen scalar loads of a chunk are
        # 0.01 % of its bytes, and 1,000 tensors still make more chunks than any card here has SMs.
        return cls(chunk=65536, block=1024, num_warps=256 // card.warp_size)

    @classmethod
    def candidates(cls, card: Card) -> list["MultiTensorLaunch"]:
        """What a tuner should try."""
        """Shorter chunks too: they even out tensors of mixed sizes."""
        threads = {1024: (128, 256), 2048: (256, 512)}
        return [
            cls(chunk, block, num // card.warp_size)
            for chunk in (16384, 32768, 65536)
            for block, numbers in threads.items()
            for num in numbers
        ]


MULTI_TENSOR_ADAMW = Tunable(
    "multi_tensor_adamw_",
    (_multi_tensor_adamw_kernel,),
    MultiTensorLaunch,
    MultiTensorLaunch.heuristic,
    MultiTensorLaunch.candidates,
)


def _type(dtype: torch.dtype) -> Any:
    return {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype_name(dtype)]


@dataclass(frozen=True, slots=True)
class TensorColumns:
    """What a table is made of: one entry per tensor in every list.

    Attributes:
        masters: fp32, contiguous, on one device.
        exp_avgs, exp_avg_sqs: fp32 or all bf16, with as many elements.
        outs: bf16 or fp16 tensors that receive the rounded weights; None where the masters are the weights.
        rows: which row of scalars each takes: 0 to R − 1.
        places: numbers that stochastic rounding tells tensors apart by.
    """

    masters: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    outs: Sequence[Tensor] | None
    rows: Sequence[int]
    places: Sequence[int]


class MultiTensorAdamW:
    """One launch's table, made once; a step writes scalars and, where they moved, the gradients' addresses.

    It holds addresses, not tensors: whoever keeps it sees to it that the tensors stay where they are.

    Args:
        columns: the tensors.
        grad_dtype: type of all gradients: fp32, bf16 or fp16.
        decoupled: AdamW's weight decay; False is Adam with L2.
        stochastic_rounding: of bf16 ``outs``.
    """

    def __init__(
        self, columns: TensorColumns, grad_dtype: torch.dtype, decoupled: bool, stochastic_rounding: bool
    ) -> None:
        first = columns.masters[0]
        self.device, self.num_tensors = first.device, len(columns.masters)
        self.num_rows = 1 + max(columns.rows)
        self.launch = MULTI_TENSOR_ADAMW.resolve(card_of(first))
        out_type = None if columns.outs is None else _type(columns.outs[0].dtype)
        self._types = {"STATE": _type(columns.exp_avgs[0].dtype), "GRAD": _type(grad_dtype), "OUT": out_type}
        self._flags: dict[str, Any] = {"DECOUPLED": decoupled, "RANDOM": stochastic_rounding}
        self._flags["RANDOM_STATE"] = columns.exp_avgs[0].dtype == torch.bfloat16
        self._fixed = torch.from_numpy(_fixed_words(columns)).to(self.device)
        self._chunks = torch.from_numpy(chunks_of([t.numel() for t in columns.masters], self.launch.chunk))
        self._chunks = self._chunks.to(self.device)
        self._host = np.zeros(ROW_WORDS * self.num_rows + self.num_tensors, dtype=np.int64)
        words = self._host[: ROW_WORDS * self.num_rows]
        self._numbers, self._coefficients = words.reshape(-1, ROW_WORDS), words.view(np.float32).reshape(-1, 16)
        self._grads = self._host[ROW_WORDS * self.num_rows :]
        self._moving = torch.zeros(self._host.size, dtype=torch.int64, device=self.device)
        self._rows = self._moving[: ROW_WORDS * self.num_rows].view(torch.float32)
        self._pins = self.device.type != "cpu"
        self._grads_are_new = False

    def set_row(self, row: int, at: AdamWStep, rounding_seed: int = 0) -> None:
        """Write the scalars of one row for this step."""
        self._coefficients[row, :9] = at.coefficients
        self._numbers[row, STEP_WORD] = at.step
        self.set_seed(row, rounding_seed)

    def set_seed(self, row: int, rounding_seed: int) -> None:
        """Write what stays of a row, where the rest is worked out on the device."""
        self._numbers[row, SEED_WORD] = rounding_seed

    def set_grads(self, addresses: np.ndarray) -> None:
        """Say where the gradients are: int64 [T]."""
        self._grads[:] = addresses
        self._grads_are_new = True

    @property
    def rows_on_device(self) -> tuple[Tensor, Tensor]:
        """The rows themselves: their numbers, int64 [R, 8], and their coefficients, fp32 [R, 16], in one memory."""
        return self._moving[: ROW_WORDS * self.num_rows].view(-1, ROW_WORDS), self._rows.view(-1, 16)

    def upload_(self) -> None:
        """Bring what was set to the device."""
        num_words = self._host.size if self._grads_are_new else ROW_WORDS * self.num_rows
        self._grads_are_new = False
        source = torch.from_numpy(self._host[:num_words])
        if self._pins:
            # a fresh block each time: the allocator keeps it until the copy has read it, and hands it out again then
            source = torch.empty(num_words, dtype=torch.int64, pin_memory=True).copy_(source)
        self._moving[:num_words].copy_(source, non_blocking=True)

    def update_(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Update every tensor in one launch, with what was uploaded."""
        with on_device_of(self._moving):
            launch(
                _multi_tensor_adamw_kernel, (self._chunks.shape[1],),
                self._fixed, self._chunks, self._moving, self._rows, grad_scale, found_inf, self.num_tensors,
                self._chunks.shape[1], self.num_rows, **self._types, **self._flags, CHUNK=self.launch.chunk,
                BLOCK=self.launch.block, INTERPRET=INTERPRETED, num_warps=self.launch.num_warps,
            )  # fmt: skip


def _fixed_words(columns: TensorColumns) -> np.ndarray:
    tensors = (columns.masters, columns.exp_avgs, columns.exp_avg_sqs, columns.outs)
    words = np.zeros((_NUM_FIXED, len(columns.masters)), dtype=np.int64)
    for i, column in enumerate(tensors):
        if column is not None:
            words[i] = addresses_of(column)
    words[4] = [t.numel() for t in columns.masters]
    words[5] = [_signed(place * PLACE_STEP) for place in columns.places]
    words[6] = columns.rows
    return words


def addresses_of(tensors: Sequence[Tensor]) -> np.ndarray:
    """int64 [T]. 46 ns a tensor on an AMD EPYC; collecting a list first takes as long again."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def chunks_of(num_elems: Sequence[int], chunk: int) -> np.ndarray:
    """Tensor and number of every chunk, int32 [2, C]: full ones first, so that the last wave is made of short ones."""
    full = [(t, i) for t, n in enumerate(num_elems) for i in range(n // chunk)]
    rest = [(t, n // chunk) for t, n in enumerate(num_elems) if n % chunk]
    rest.sort(key=lambda at: -(num_elems[at[0]] % chunk))
    return np.array([*full, *rest], dtype=np.int32).reshape(-1, 2).T.copy()
