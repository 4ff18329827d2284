"""Record what DeepSpeed's dynamic loss scaler does, as the oracle of tests/precision/test_loss_scale.py.

    VENV/bin/python bench/peers/record_loss_scale.py OUT.json [--num-random N]

VENV is the peers' environment (setup.sh). Nothing of this project is imported. Each case is a setting and a string of
steps, "x" for an overflow and "." for none; recorded are the scale and the hysteresis left after each. The real class
runs with raise_error_at_min_scale=False, its own switch to go on at the floor.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

HAND_WRITTEN = [
    # (initial power, window, hysteresis, consecutive hysteresis, floor, steps)
    (16, 5, 2, False, 1, "." * 17),
    (16, 5, 2, False, 1, "x.x.x......x"),
    (16, 5, 2, True, 1, "x.x.x......xx.xx"),
    (16, 3, 1, False, 1, "x...x....xxx........"),
    (16, 1, 2, False, 1, "....x..x...xx.."),
    (4, 6, 1, False, 4, "xxxxx.......x"),
    (3, 6, 3, False, 1, "xxxxxxxxxx......x......."),
    (5, 4, 2, True, 3, "xxxxxxxx.....x.....xx"),
    (32, 4, 2, False, 1, "xxxxxxxxxxxxxxxxxxxx.....x....."),
]
NUM_RANDOM_STEPS = 60


def random_cases(number: int):
    """Every combination of settings in turn, with overflow rates from rare to constant."""
    chance = random.Random(0)
    settings = itertools.cycle(itertools.product((2, 16), (1, 3, 7), (1, 2, 4), (False, True), (1, 2)))
    for _ in range(number):
        power, window, hysteresis, consecutive, floor = next(settings)
        rate = chance.choice((0.05, 0.2, 0.5, 0.9))
        steps = "".join("x" if chance.random() < rate else "." for _ in range(NUM_RANDOM_STEPS))
        yield power, window, hysteresis, consecutive, floor, steps


def record(scaler_class, power: int, window: int, hysteresis: int, consecutive: bool, floor: int, steps: str) -> dict:
    scaler = scaler_class(
        init_scale=2**power,
        scale_window=window,
        min_scale=floor,
        delayed_shift=hysteresis,
        consecutive_hysteresis=consecutive,
        raise_error_at_min_scale=False,
    )
    scales, left = [], []
    for step in steps:
        scaler.update_scale(step == "x")
        scales.append(scaler.cur_scale)
        left.append(scaler.cur_hysteresis)
    return {
        "initial_scale_power": power,
        "loss_scale_window": window,
        "hysteresis": hysteresis,
        "consecutive_hysteresis": consecutive,
        "min_loss_scale": floor,
        "steps": steps,
        "scales": scales,
        "hysteresis_left": left,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--num-random", type=int, default=24)
    chosen = arguments.parse_args()

    import deepspeed
    from deepspeed.runtime.fp16 import loss_scaler

    loss_scaler.dist.get_rank = lambda: 1  # it asks for its rank only to log, and needs no process group for that
    cases = itertools.chain(HAND_WRITTEN, random_cases(chosen.num_random))
    rows = [json.dumps(record(loss_scaler.DynamicLossScaler, *case)) for case in cases]
    head = json.dumps({"source": f"deepspeed {deepspeed.__version__}, DynamicLossScaler", "cases": []})
    chosen.out.write_text(head[:-2] + "\n" + ",\n".join(rows) + "\n]}\n")
    print(f"{len(rows)} cases → {chosen.out}")


if __name__ == "__main__":
    main()
