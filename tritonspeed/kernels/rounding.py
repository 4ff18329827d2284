"""Load → fp32 → compute → round → store: the first and the last two steps, once for every kernel.

Round to nearest even is what hardware does; the interpreter truncates fp32 → bf16 instead (triton 3.6 to 3.9), so there
the nearest value is found on the bits. Stochastic rounding of x between two bf16 neighbours a < b is b with probability
(x − a)/(b − a): add 16 random bits below bf16's last one, then cut them off. Its mean is x, so updates smaller than
half a step of the low-precision copy are not lost on average.

    bits(y) = (bits(x) + (w & 0xFFFF)) & 0xFFFF0000          w = philox4x32-7(key = seed, counter = i div 4)[i mod 4]

i is the element's index, so a buffer cut into slices rounds as the whole does, on any device.
Source   Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (7 rounds pass BigCrush; ten are the default)
"""

import torch
from torch import Tensor

from tritonspeed.kernels._triton import tl, triton

GROUP_ELEMS = 4  # elements that share one philox call: it yields four words
_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox_reference(seed: int | Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each 64-bit counter.

    Args:
        seed: 0 ≤ seed < 2⁶³; a () int64 tensor where it must not leave the device.
        counter: int64, any shape.

    Returns:
        Four int64 tensors of counter's shape, each value in [0, 2³²).
    """
    key = [seed & _WORD, seed >> 32]
    c0, c1, c2, c3 = counter & _WORD, (counter >> 32) & _WORD, torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(_ROUNDS):
        # int64 wraps, but the low word of a wrapped product is right and so is its high word once masked
        product_0, product_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product_2 >> 32) & _WORD) ^ c1 ^ key[0], ((product_0 >> 32) & _WORD) ^ c3 ^ key[1]
        c1, c3 = product_2 & _WORD, product_0 & _WORD
        key = [(k + step) & _WORD for k, step in zip(key, _KEY_STEPS, strict=True)]
    return c0, c1, c2, c3


def round_stochastic_reference(x: Tensor, seed: int, first_element: int = 0, shift: int = 0) -> Tensor:
    """Round fp32 to bf16 up or down at random, unbiased; NaN and infinity stay what they are.

    Args:
        x: (n,) fp32.
        seed: 0 ≤ seed < 2⁶³.
        first_element: index of x[0] in the buffer that x is a slice of, a multiple of ``GROUP_ELEMS``.
        shift: 0 takes the low half of each word, 16 the high one, for a second tensor of the same seed.

    Returns:
        (n,) bf16.
    """
    assert first_element % GROUP_ELEMS == 0, f"first_element {first_element} is no multiple of {GROUP_ELEMS}"
    first_group, num_groups = first_element // GROUP_ELEMS, -(-x.numel() // GROUP_ELEMS)
    counter = torch.arange(first_group, first_group + num_groups, dtype=torch.int64, device=x.device)
    words = torch.stack(philox_reference(seed, counter), dim=1).flatten()[: x.numel()]
    bits = x.view(torch.int32) + ((words >> shift) & 0xFFFF).to(torch.int32)
    rounded = (bits & -0x10000).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)  # a NaN of all ones would wrap to −0


@triton.jit
def as_scalar(x, dtype):
    """A float argument in the type of computation: to Inductor and the interpreter it is fp64."""
    return tl.cast(x, dtype)


@triton.jit
def load(at, inside, ACC: tl.constexpr, EVICT: tl.constexpr):
    """Load and widen to ACC; ``inside`` None is the full tile, whose accesses are wide because no lane can be off.

    EVICT is a cache hint: "evict_first" for what is read once, "evict_last" for what is read again, "" for neither.
    """
    if inside is None:
        x = tl.load(at, eviction_policy=EVICT)
    else:
        x = tl.load(at, mask=inside, other=0.0, eviction_policy=EVICT)
    return x.to(ACC)


@triton.jit
def load_fp32(at, inside):
    """``load`` for what is always computed in fp32."""
    return load(at, inside, tl.float32, "")


@triton.jit
def store(at, x, inside):
    """Store a value that has its final type; ``inside`` as in ``load``."""
    if inside is None:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=inside)


@triton.jit
def round_nearest(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 → dtype, to nearest even; any type that is not bf16 is converted as it is."""
    if INTERPRET and dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rounded(at, x, inside, INTERPRET: tl.constexpr):
    """Round to nearest even in the pointer's type, and store; ``inside`` as in ``load``."""
    store(at, round_nearest(x, at.dtype.element_ty, INTERPRET), inside)


@triton.jit
def round_stochastic(x, first_element, seed, BLOCK: tl.constexpr, SHIFT=0):
    """fp32 [BLOCK] → bf16, the element at ``first_element`` (a multiple of 4) first."""
    group = first_element // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0, n_rounds=tl.constexpr(7))
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK/4, 2, 2]: word 2a + b at (·, a, b)
    words = tl.reshape(pairs, [BLOCK])
    bits = (x.to(tl.uint32, bitcast=True) + ((words >> SHIFT) & 0xFFFF)) & 0xFFFF0000
    return tl.where(x == x, bits, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def store_copy(out_ptr, p, offsets, inside, seed, first_element, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """The rounded copy of an update's weights, if one is asked for: to nearest, or at random where there is a seed."""
    if out_ptr is not None:
        if seed is None:
            out = round_nearest(p, out_ptr.dtype.element_ty, INTERPRET)
        else:
            out = round_stochastic(p, first_element, seed, BLOCK)
        store(out_ptr + offsets, out, inside)
