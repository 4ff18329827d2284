"""AdamW's machine code beyond what test_machine_code.py asks: only wide accesses, no exchange between threads."""

import re

import pytest
from builds.adamw import BUILDS
from lanes import compiled

from tritonspeed.kernels._triton import recording
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.machine_code import machine_code


@compiled
@pytest.mark.parametrize("card_name", CARDS)
@pytest.mark.parametrize("build", BUILDS)
def test_the_full_tile_moves_whole_words(build: str, card_name: str) -> None:
    card = CARDS[card_name]
    with recording(card) as launches:
        BUILDS[build].call()
    built = machine_code(launches[0], card)
    has_fp32_grad, has_copy = build.startswith("fp32"), "no copy" not in build
    num_16_bit = 2 if "bf16 moments" in build else 0
    assert built.shared_bytes == 0, "a layout change crept in between loads and stores"
    assert built.loads[16] == (4 if has_fp32_grad else 3) - num_16_bit
    assert built.loads[8] == (0 if has_fp32_grad else 1) + num_16_bit, "four 16-bit elements a thread"
    assert built.stores[16] == 3 - num_16_bit
    assert built.stores[8] == (1 if has_copy else 0) + num_16_bit
    widened = re.search(r"(%\S+) = tt\.get_program_id x : i32.*?arith\.extsi \1 : i32 to i64", built.ttir, re.DOTALL)
    assert widened, "the program's index is scaled before it is widened: offsets past 2³¹ would wrap"
