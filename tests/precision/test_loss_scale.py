"""The loss-scale automaton: tables derived by hand, and the behaviour recorded from DeepSpeed's class.

recorded_loss_scale.json is written by bench/peers/record_loss_scale.py where DeepSpeed is installed.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tritonspeed.precision import LossScaler, Policy, ScaleChange

RECORDED = json.loads((Path(__file__).parent / "recorded_loss_scale.json").read_text())["cases"]
LETTER = {
    ScaleChange.NONE: "-",
    ScaleChange.RAISED: "R",
    ScaleChange.TOLERATED: "T",
    ScaleChange.LOWERED: "L",
    ScaleChange.AT_FLOOR: "F",
    ScaleChange.FIXED: "S",
}


def fp16_config(**values):
    defaults = {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
    }
    return SimpleNamespace(fp16=SimpleNamespace(**(defaults | values)))


def run(scaler, steps):
    return [scaler.update(step == "x") for step in steps]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["steps"][:32])
def test_equals_deepspeed(case):
    settings = {key: value for key, value in case.items() if key not in ("steps", "scales", "hysteresis_left")}
    scaler = LossScaler.from_config(fp16_config(**settings), Policy.of("fp16"))
    assert scaler.scale == 2 ** case["initial_scale_power"]
    events = run(scaler, case["steps"])
    assert [event.scale_after for event in events] == case["scales"]
    assert [event.hysteresis_left for event in events] == case["hysteresis_left"]
    assert [event.scale_before for event in events[1:]] == case["scales"][:-1]
    assert [event.overflow for event in events] == [step == "x" for step in case["steps"]]


@pytest.mark.parametrize(
    ("settings", "steps", "changes", "last_scale"),
    [
        # window 3: the first doubling is at update 4, then every 3 updates
        ({"window": 3}, "..........", "---R--R--R", 128.0),
        # after an overflow at update 2 the count starts again: three quiet updates do not suffice, the fourth doubles
        ({"window": 3, "hysteresis": 1}, "..x....", "--L---R", 16.0),
        # patience 2: the first overflow is tolerated, the second lowers, and so does every one after
        ({"hysteresis": 2}, "xxxx", "TLLL", 2.0),
        # patience is not refilled by a quiet update ...
        ({"hysteresis": 2}, "x.x.x", "T-L-L", 4.0),
        # ... unless it is consecutive
        ({"hysteresis": 2, "consecutive_hysteresis": True}, "x.x.xx", "T-T-TL", 8.0),
        # ... or a whole window was quiet
        ({"hysteresis": 2, "window": 2}, "xx...xx", "TL--RTL", 8.0),
        # the floor: stays, and says so, as often as it is hit; then recovers
        ({"hysteresis": 1, "min_scale": 4.0, "window": 2}, "xxxx...", "LLFF--R", 8.0),
        # a floor that is no power of two is landed on
        ({"hysteresis": 1, "min_scale": 3.0}, "xxxx", "LLLF", 3.0),
    ],
)
def test_hand_derived(settings, steps, changes, last_scale):
    scaler = LossScaler(initial_scale=16.0, dynamic=True, **settings)
    assert "".join(LETTER[event.change] for event in run(scaler, steps)) == changes
    assert scaler.scale == last_scale


@pytest.mark.parametrize("scale", [1.0, 128.0])
def test_a_fixed_scale_never_moves(scale):
    scaler = LossScaler(initial_scale=scale)
    events = run(scaler, "..xx" * 600)
    assert "".join(LETTER[event.change] for event in events[:8]) == "--SS--SS"
    assert {event.scale_after for event in events} == {scale}


@pytest.mark.parametrize(
    ("policy", "fp16", "dynamic", "scale"),
    [
        (Policy.of("fp32"), {"enabled": False}, False, 1.0),
        (Policy.of("bf16"), {"enabled": False}, False, 1.0),
        (Policy.of("fp16"), {}, True, 65536.0),
        (Policy.of("fp16"), {"initial_scale_power": 32}, True, 2.0**32),
        (Policy.of("fp16"), {"loss_scale": 128}, False, 128.0),
        (Policy.with_autocast("bf16"), {"enabled": False}, False, 1.0),
        (Policy.with_autocast("fp16"), {"enabled": False}, True, 65536.0),
    ],
)
def test_from_config(policy, fp16, dynamic, scale):
    scaler = LossScaler.from_config(fp16_config(**fp16), policy)
    assert (scaler.dynamic, scaler.scale) == (dynamic, scale)


def test_overflows_in_a_row_are_counted():
    events = run(LossScaler(initial_scale=2.0, dynamic=True, hysteresis=1), "xxx.x")
    assert [event.num_overflows_in_a_row for event in events] == [1, 2, 3, 0, 1]


@pytest.mark.parametrize("cut", [0, 1, 7, 12, 25])
def test_resumes_from_its_state(cut):
    steps = "xx..x....x..xxxxx.......x....x"
    settings = {"initial_scale": 64.0, "dynamic": True, "window": 3, "hysteresis": 2}
    whole = run(LossScaler(**settings), steps)
    scaler = LossScaler(**settings)
    run(scaler, steps[:cut])
    resumed = LossScaler(**settings)
    resumed.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert run(resumed, steps[cut:]) == whole[cut:]


def test_a_scale_that_is_fixed_now_stays_as_configured():
    dynamic = LossScaler(initial_scale=64.0, dynamic=True, hysteresis=1)
    run(dynamic, "xx")
    fixed = LossScaler(initial_scale=128.0)
    fixed.load_state_dict(dynamic.state_dict())
    assert fixed.scale == 128.0
    dynamic.load_state_dict(fixed.state_dict())
    assert dynamic.scale == 16.0


def test_loading_something_else_is_refused():
    with pytest.raises(ValueError, match="not a loss scaler's state.*cur_scale"):
        LossScaler().load_state_dict({"cur_scale": 3})


def test_the_floor_names_the_first_parameter_and_a_way_out():
    events = run(LossScaler(initial_scale=2.0, dynamic=True, hysteresis=1), "xxx")
    text = events[-1].describe("blocks.3.attention.qkv.weight")
    assert events[-1].change is ScaleChange.AT_FLOOR
    for part in ("blocks.3.attention.qkv.weight", "min_loss_scale", "3 step(s) in a row", "bf16", "skipped"):
        assert part in text, part


@pytest.mark.parametrize(
    ("scaler", "steps", "parts"),
    [
        (LossScaler(16.0, True, hysteresis=1), "x", ("16 → 8", "skipped", "'w'")),
        (LossScaler(16.0, True, hysteresis=3), "x", ("16 kept", "number 2", "skipped")),
        (LossScaler(16.0, True, window=1), "..", ("16 → 32",)),
        (LossScaler(128.0), "x", ("128 is fixed", "fp16.loss_scale", "skipped")),
        (LossScaler(), "xx", ("skipped", "2 step(s) in a row")),
    ],
)
def test_an_event_says_what_happened(scaler, steps, parts):
    text = run(scaler, steps)[-1].describe("w")
    for part in parts:
        assert part in text, (part, text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hysteresis": 0}, "hysteresis is 0"),
        ({"loss_scale_window": 0}, "loss_scale_window is 0"),
        ({"min_loss_scale": 0}, "min_loss_scale is 0"),
        ({"min_loss_scale": 8, "initial_scale_power": 2}, "min_loss_scale is 8.*initial scale 4"),
        ({"loss_scale": -1}, "loss_scale is -1"),
        ({"loss_scale": float("inf")}, "positive and finite"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LossScaler.from_config(fp16_config(**settings), Policy.of("fp16"))


def test_scaling_by_the_scale_changes_no_bit():
    gradient = torch.randn(257, generator=torch.Generator().manual_seed(0)) * 1e-3
    scale = LossScaler(2.0**16, True).scale
    assert torch.equal(gradient * scale * (1.0 / scale), gradient)
