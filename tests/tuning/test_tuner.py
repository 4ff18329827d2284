"""The search, with a clock whose answers are known: who wins, who may not, and what is left after a kill."""

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import (
    BEST_BLOCK,
    CARD,
    CPU,
    QUICK,
    TOY,
    WRONG_BLOCK,
    Clock,
    ToyLaunch,
    double,
    hungry_case,
    search_in,
    toy_case,
    true_ms,
)

from tritonspeed import comm, tuning
from tritonspeed.kernels import tuned
from tritonspeed.kernels._triton import recording
from tritonspeed.kernels.store import SHIPPED, FolderStore, Layers, Unwritable, default_folder
from tritonspeed.tuning import Search, Tuner, plan
from tritonspeed.tuning.planning import NOT_IN_TIME
from tritonspeed.tuning.tuner import GpuBroken

BEST = {"block": BEST_BLOCK, "num_warps": 4}
HEURISTIC = {"block": 1024, "num_warps": 4}
CANDIDATE_TIMES = 10 - 1 + 3  # every candidate but the heuristic's, then the best third


@pytest.fixture(autouse=True)
def own_stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuned, "_stores", [])
    TOY.forget()
    yield
    TOY.forget()


def times_asked(clock: Clock) -> int:
    """Candidates timed in the rungs: the heuristic is in every group, the final is the last one."""
    return sum(len(names) - 1 for names, _ in clock.asked[:-1])


def entry_in(folder: Path):
    return FolderStore(folder).entries(CARD.key, "toy")["n=128"][TOY.source]


def test_the_fastest_that_is_right_wins(tmp_path: Path) -> None:
    (outcome,) = search_in(tmp_path, Clock())
    assert (outcome.verdict, outcome.launch, outcome.num_candidates) == ("tuned", BEST, 10)
    assert outcome.gain == pytest.approx(1 / 0.75 - 1)
    entry = entry_in(tmp_path)
    assert entry.launch == BEST and not entry.is_heuristic
    measured = entry.measured
    assert measured["median_us"] == pytest.approx(750) and measured["heuristic_median_us"] == pytest.approx(1000)
    assert measured["p20_us"] < measured["median_us"] < measured["p80_us"]
    assert measured["gb_per_s"] == pytest.approx(800 / 0.75e-3 / 1e9)
    assert measured["num_candidates"] == 10 and measured["case"] == toy_case().label
    assert {"date", "device", "driver", "torch", "triton", "tritonspeed"} <= measured.keys()


def test_a_candidate_with_wrong_numbers_is_rejected_however_fast(tmp_path: Path) -> None:
    (outcome,) = search_in(tmp_path, Clock())
    assert sum(f"block={WRONG_BLOCK}" in line and "is wrong" in line for line in outcome.why) == 2
    assert outcome.launch == BEST, "the wrong ones were ahead and have taken nobody's place"


def test_where_every_candidate_is_wrong_the_heuristic_stays(tmp_path: Path) -> None:
    def run(inputs):
        how = TOY.resolve(CARD, n=128)
        return inputs["x"] * (2 if how == ToyLaunch(**HEURISTIC) else 2 + 1e-4)

    (outcome,) = search_in(tmp_path, Clock(), cases=[replace(toy_case(), run=run)])
    assert (outcome.verdict, outcome.launch, outcome.gain) == ("rejected", HEURISTIC, 0.0)
    assert len(outcome.why) == 9 and entry_in(tmp_path).is_heuristic


@pytest.mark.parametrize(("factor", "wins"), [(0.97, True), (0.985, False), (1.0, False), (1.2, False)])
def test_two_percent_are_needed(tmp_path: Path, factor: float, wins: bool) -> None:
    clock = Clock(
        lambda name: factor if f"block={BEST_BLOCK}," in name else 1.0 if "=1024,num_warps=4" in name else 3.0
    )
    (outcome,) = search_in(tmp_path, clock)
    assert outcome.verdict == ("tuned" if wins else "heuristic")
    assert entry_in(tmp_path).is_heuristic is not wins
    assert (outcome.launch == HEURISTIC) is not wins


def test_a_winner_by_one_lucky_round_does_not_survive_the_final(tmp_path: Path) -> None:
    class Lucky(Clock):
        def __call__(self, variants, sets, device, rounds):
            times = super().__call__(variants, sets, device, rounds)
            lucky = "block=2048,num_warps=8"
            if rounds < QUICK.final_rounds and lucky in times:
                times[lucky] = [0.01] * rounds
            return times

    (outcome,) = search_in(tmp_path, Lucky())
    assert outcome.launch == BEST


def test_what_is_known_is_not_searched_again(tmp_path: Path) -> None:
    search_in(tmp_path, Clock())
    again = Clock()
    (outcome,) = search_in(tmp_path, again)
    assert (outcome.verdict, outcome.launch, again.asked) == ("known", BEST, [])
    (outcome,) = search_in(tmp_path, again, replace(QUICK, again=True))
    assert outcome.verdict == "tuned" and times_asked(again) == CANDIDATE_TIMES


def test_a_changed_kernel_is_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search_in(tmp_path, Clock())
    monkeypatch.setitem(TOY.__dict__, "source", "another")
    (outcome,) = search_in(tmp_path, clock := Clock())
    assert outcome.verdict == "tuned" and times_asked(clock) == CANDIDATE_TIMES
    assert FolderStore(tmp_path).entries(CARD.key, "toy")["n=128"].keys() == {TOY.source, "e3b0c44298fc1c14"}


def test_the_winner_is_taken_by_the_next_call_and_a_stale_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_in(tmp_path, Clock())
    tuned.use_stores([Layers([FolderStore(tmp_path)])])
    assert TOY.resolve(CARD, n=128) == ToyLaunch(**BEST)
    assert TOY.resolve(CARD, n=256) == ToyLaunch(**HEURISTIC)
    monkeypatch.setitem(TOY.__dict__, "source", "changed since")
    TOY.forget()
    assert TOY.resolve(CARD, n=128) == ToyLaunch(**HEURISTIC)


def test_an_entry_with_other_fields_is_not_taken(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put(CARD, "toy", TOY.source, "n=128", replace(store_entry(), launch={"block": 1, "warps": 2}))
    tuned.use_stores([FolderStore(tmp_path)])
    assert TOY.resolve(CARD, n=128) == ToyLaunch(**HEURISTIC)
    (outcome,) = search_in(tmp_path, Clock())
    assert outcome.verdict == "tuned", "what cannot be used is not known"


def store_entry():
    from tritonspeed.kernels.store import Entry

    return Entry({"block": 1, "num_warps": 1})


KILLED = """
    import sys
    from pathlib import Path
    from toys import Clock, search_in

    search_in(Path(sys.argv[1]), Clock(kill_after=int(sys.argv[2])))
"""


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_a_search_that_was_killed_goes_on_where_it_was(tmp_path: Path, groups: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(groups)]
    here = str(Path(__file__).parent)
    done = subprocess.run(
        command, env={"PYTHONPATH": f"{here}:{Path(here).parents[1]}"}, capture_output=True, timeout=120
    )
    assert done.returncode == -9, done.stderr
    whole = Clock()
    search_in(tmp_path / "whole", whole)
    rest = Clock()
    (outcome,) = search_in(tmp_path, rest)
    assert outcome.verdict == "tuned" and outcome.launch == BEST
    timed_before = sum(len(names) - 1 for names, _ in whole.asked[:groups])
    assert times_asked(rest) == times_asked(whole) - timed_before


def test_a_time_limit_ends_with_what_there_is(tmp_path: Path) -> None:
    class Slow(Clock):
        def __call__(self, variants, sets, device, rounds):
            time.sleep(0.15)
            return super().__call__(variants, sets, device, rounds)

    cases = [toy_case(100), toy_case(1000), toy_case(10000)]
    first = Slow()
    outcomes = search_in(tmp_path, first, replace(QUICK, time_limit_s=1.1), cases)
    assert [outcome.verdict for outcome in outcomes] == ["tuned", "out of time", "out of time"]
    assert outcomes[0].launch == BEST and outcomes[1].launch is None
    rest = Clock()
    outcomes = search_in(tmp_path, rest, cases=cases)
    assert [outcome.verdict for outcome in outcomes] == ["known", "tuned", "tuned"]
    everything = Clock()
    search_in(tmp_path / "everything", everything, cases=cases)
    assert sum(len(n) for n, _ in rest.asked) < sum(len(n) for n, _ in everything.asked)


def test_a_search_among_some_of_the_candidates_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, clock = [toy_case(), hungry_case()], Clock()
    outcomes = search_in(tmp_path, clock, replace(QUICK, time_limit_s=1e-3), cases)
    assert [outcome.verdict for outcome in outcomes] == ["out of time", "out of time"] and clock.asked == []
    until: list[float | None] = []

    def too_late(jobs, card, num_workers, deadline, on_progress):
        until.append(deadline - time.monotonic())
        for candidate in jobs[1].candidates[1:]:
            candidate.refused = NOT_IN_TIME

    monkeypatch.setattr("tritonspeed.tuning.tuner.prune", too_late)
    outcomes = search_in(tmp_path, clock, replace(QUICK, time_limit_s=100.0), cases)
    assert [outcome.verdict for outcome in outcomes] == ["tuned", "out of time"]
    assert until[0] == pytest.approx(50, abs=5), "time is left for timing"


def test_one_case_stands_for_those_that_share_a_decision() -> None:
    jobs = plan([toy_case(70), toy_case(128), toy_case(100), toy_case(129)], CARD)
    assert [(job.features, job.case.shape["n"]) for job in jobs] == [({"n": 128}, 128), ({"n": 256}, 129)]
    assert plan([toy_case()], CARD, names=["another"]) == []


def test_a_case_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    def reference(inputs):
        raise RuntimeError("no such type on this card\nat line 3")

    broken, wrong = (
        replace(toy_case(1000), reference=reference),
        replace(toy_case(5000), reference=lambda i: i["x"] * 3),
    )
    outcomes = search_in(tmp_path, Clock(), cases=[broken, wrong, toy_case()])
    assert [outcome.verdict for outcome in outcomes] == ["skipped", "skipped", "tuned"]
    assert outcomes[0].why == ("failed: RuntimeError: no such type on this card",)
    assert outcomes[1].why[0].startswith("the kernel is wrong as the heuristic launches it: output 0 is")
    assert FolderStore(tmp_path).summary() == {CARD.key: {"toy": 1}}


def run_failing(message: str):
    def run(inputs):
        how = TOY.resolve(CARD, n=128)
        if how.block == 2048:
            raise RuntimeError(message)
        return inputs["x"] * 2

    return run


def test_a_candidate_that_cannot_be_launched_is_left_out(tmp_path: Path) -> None:
    (outcome,) = search_in(tmp_path, clock := Clock(), cases=[replace(toy_case(), run=run_failing("out of resource"))])
    assert outcome.launch == {"block": WRONG_BLOCK, "num_warps": 4}, "here nothing is wrong with it"
    assert not any("2048" in name for names, _ in clock.asked for name in names)
    assert outcome.num_timed == 8


def test_a_folder_that_cannot_be_written_is_found_out_before_anything_is_timed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unwritable, match="--out DIR"):
        search_in(tmp_path / "file", clock := Clock())
    assert clock.asked == []


def tuner_on_gpu(folder: Path) -> Tuner:
    return Tuner(CARD, torch.device("cuda"), FolderStore(folder), QUICK, Clock())


def test_what_broke_the_gpu_is_left_out_in_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = []
    plain_run = double

    def run(inputs):
        y = plain_run(inputs["x"])
        if TOY._pinned is not None and TOY._pinned[0].block == 256:
            broken.append(1)
        return y

    def synchronize(device):
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr("tritonspeed.tuning.tuner.num_rotations", lambda size, device: 1)
    monkeypatch.setattr("tritonspeed.tuning.tuner.warm_up", lambda device: None)
    monkeypatch.setattr("tritonspeed.tuning.tuner.header", lambda device: {})
    monkeypatch.setattr("tritonspeed.tuning.tuner.device_name", lambda device: "made up")
    case = replace(toy_case(), run=run, make=lambda device, seed: toy_case().make(CPU, seed))

    def planned():
        jobs = plan([case], CARD)
        broken.clear()  # planning calls it too
        return jobs

    for _ in range(2):  # two candidates have this block
        with pytest.raises(GpuBroken, match=r"toy block=256,num_warps=. on double forward .* start again"):
            tuner_on_gpu(tmp_path).run(planned())
    (outcome,) = tuner_on_gpu(tmp_path).run(planned())
    assert outcome.verdict == "tuned" and "2 broke the GPU in an earlier run" in outcome.why


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 2**40))
    monkeypatch.setattr("tritonspeed.tuning.tuner.num_rotations", lambda size, device: 1)
    monkeypatch.setattr("tritonspeed.tuning.tuner.warm_up", lambda device: None)
    case = replace(toy_case(), make=lambda device, seed: toy_case().make(CPU, seed))
    (outcome,) = tuner_on_gpu(tmp_path).run(plan([case], CARD))
    assert outcome.verdict == "skipped" and "GiB of the GPU are free" in outcome.why[0]


def test_tune_writes_and_uses_at_once(tmp_path: Path) -> None:
    tuning.use(tmp_path)
    seen = []
    x = torch.ones(100)
    (outcome,) = tuning.tune(
        [toy_case()], tmp_path, search=QUICK, device=CPU, timer=Clock(), on_progress=lambda *said: seen.append(said)
    )
    assert outcome.launch == BEST
    with tuned.listening(lambda tunable, card, features: None):
        double(x)
    assert ToyLaunch(**BEST) in TOY._resolved.values()
    assert seen[-1] == ("decisions", 1, 1) and ("timing toy", 4, 9) in seen


def test_tune_without_a_gpu_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kernels are tuned on NVIDIA and AMD GPUs"):
        tuning.tune([toy_case()], tmp_path, device=CPU)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no GPU here, so there is nothing to time"):
            tuning.tune([toy_case()], tmp_path)


def test_deterministic_leaves_the_users_folder_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = default_folder()
    assert folder == tmp_path / ".cache" / "tritonspeed" / "tuned"
    search_in(folder, Clock())
    tuning.use()
    assert TOY.resolve(CARD, n=128) == ToyLaunch(**BEST)
    tuning.use(deterministic=True)
    assert TOY.resolve(CARD, n=128) == ToyLaunch(**HEURISTIC)
    (layers,) = tuned.stores_in_use()
    assert [store.folder for store in layers.stores] == [SHIPPED]
    tuning.use(tmp_path / "elsewhere")
    assert TOY.resolve(CARD, n=128) == ToyLaunch(**HEURISTIC)
    tuning.use(folder)
    assert TOY.resolve(CARD, n=128) == ToyLaunch(**BEST)
    with pytest.raises(ValueError, match="drop one of the two"):
        tuning.use(folder, deterministic=True)


def test_a_program_that_chose_nothing_gets_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    search_in(default_folder(), Clock())
    monkeypatch.setattr(tuned, "_stores", None)
    TOY.forget()
    assert TOY.resolve(CARD, n=128) == ToyLaunch(**BEST)


def test_the_environments_folder_is_taken_by_who_chose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("TRITONSPEED_CONFIG_DIR", str(tmp_path))
    search_in(tmp_path, Clock())
    for chosen, taken in ((None, BEST), ([], HEURISTIC)):
        monkeypatch.setattr(tuned, "_stores", chosen)
        TOY.forget()
        tuning.use_unless_chosen(comm.tuned_folder())
        assert TOY.resolve(CARD, n=128) == ToyLaunch(**taken)
    monkeypatch.delenv("TRITONSPEED_CONFIG_DIR")
    assert comm.tuned_folder() is None


def test_a_pin_comes_before_every_store(tmp_path: Path) -> None:
    search_in(tmp_path, Clock())
    tuning.use(tmp_path)
    with TOY.pinned(ToyLaunch(1, 1), {"n": 128}):
        assert TOY.resolve(CARD, n=128) == ToyLaunch(1, 1)
        assert TOY.resolve(CARD, n=256) == ToyLaunch(**HEURISTIC)
    assert TOY.resolve(CARD, n=128) == ToyLaunch(**BEST)


def test_nothing_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search_in(tmp_path, Clock())
    tuning.use(tmp_path)
    TOY.resolve(CARD, n=1024)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
    TOY.resolve(CARD, n=128)
    TOY.resolve(CARD, n=4096)


def test_the_journal_holds_what_was_timed(tmp_path: Path) -> None:
    search_in(tmp_path, Clock())
    journal = (tmp_path / CARD.key / "toy.journal").read_text().splitlines()
    lines = [json.loads(line.partition(" ")[2]) for line in journal]
    timed = [line for line in lines if line["kind"] == "timed"]
    assert len(timed) == CANDIDATE_TIMES
    for line in timed:
        assert line["ratio"] == pytest.approx(true_ms(line["launch"]), rel=1e-2)


def test_recording_finds_the_decision_without_running_anything() -> None:
    ran = []

    def run(inputs):
        ran.append(inputs["x"].sum())
        return double(inputs["x"])

    huge = replace(toy_case(2**38), run=run)  # 1 TiB that nobody touches
    (job,) = plan([huge], CARD)
    assert job.features == {"n": 2**38} and ran
    with recording(CARD):
        assert TOY.resolve(CARD, n=1) == ToyLaunch(**HEURISTIC)


def test_a_search_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = Clock(), Clock()
    assert search_in(tmp_path / "a", first) == search_in(tmp_path / "b", second)
    assert first.asked == second.asked


def test_defaults_are_a_real_search() -> None:
    search = Search()
    assert search.rounds[0] >= 3 and search.final_rounds >= 20 and search.min_gain == 0.02
