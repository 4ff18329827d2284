"""What is to be tuned, found without a GPU: recorded for a card, compiled for it, and thinned out."""

from dataclasses import replace

import pytest
import torch
from toys import CARD, HUNGRY, TOY, HungryLaunch, hungry_case, toy_case

from tritonspeed.kernels import adamw_, tuned
from tritonspeed.kernels._triton import recording
from tritonspeed.kernels.cards import CARDS, KIB
from tritonspeed.kernels.source_hash import source_hash
from tritonspeed.tuning import Case, all_cases, load_shapes, plan, planning, prune
from tritonspeed.tuning.case import Draw, gradients, tensors_of, unfilled
from tritonspeed.tuning.planning import Compiled, compile_all, decisions_of
from tritonspeed.tuning.shapes import MODELS
from tritonspeed.tuning.shapes_only import ShapesOnly
from tritonspeed.tuning.verify import distances, gross_error

CASES = {
    case.label: case
    for by_family in [all_cases([MODELS["tiny"]], torch.bfloat16)]
    for c in by_family.values()
    for case in c
}


@pytest.fixture(autouse=True)
def no_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "_stores", [])


def test_a_candidate_that_spills_is_dropped_and_one_that_does_not_compile() -> None:
    (job,) = plan([hungry_case()], CARD)
    prune([job], CARD, num_workers=2)
    refused = {candidate.launch: candidate.refused for candidate in job.candidates}
    assert refused[HungryLaunch(16384, 1)] == "spills registers"
    assert refused[HungryLaunch(3000, 4)].startswith("does not compile: ")
    assert "power of 2" in refused[HungryLaunch(3000, 4)]
    assert refused[HungryLaunch(1024, 4)] == refused[HungryLaunch(2048, 4)] == ""
    assert [c.launch for c in job.allowed] == [HungryLaunch(1024, 4), HungryLaunch(2048, 4)]


def test_what_needs_more_shared_memory_than_the_card_has_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = plan([hungry_case()], CARD)
    monkeypatch.setattr(planning, "compile_one", lambda recipe, card: Compiled(shared_bytes=100 * KIB))
    prune([job], CARD, num_workers=0)
    assert not job.refusals
    prune([job], CARDS["sm_89"], num_workers=0)
    assert job.refusals == {"too much shared memory": len(job.candidates)}
    assert job.allowed == job.candidates[:1], "the heuristic's stays: it is what a call takes"


def crash(recipe, card):
    import os

    if dict(recipe.constants)["BLOCK"] == 2048:
        os.abort()
    return Compiled()


def test_a_compiler_that_crashes_costs_its_candidate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = plan([hungry_case()], CARD)
    monkeypatch.setattr(planning, "compile_one", crash)
    prune([job], CARD, num_workers=2)
    assert {c.launch.block for c in job.candidates if c.refused == "does not compile: the compiler crashed"} == {2048}
    assert sum(job.refusals.values()) == 1


def test_compiling_ends_at_the_deadline() -> None:
    (job,) = plan([hungry_case()], CARD)
    prune([job], CARD, num_workers=0, deadline=0.0)
    assert job.refusals == {"not compiled in time": len(job.candidates)}
    assert compile_all([], CARD) == {}


def test_the_decision_of_a_real_case_is_found_on_tensors_that_are_not_there() -> None:
    (case, *_) = [c for c in CASES.values() if c.name == "adamw_"]
    ((tunable, features),) = decisions_of(case, CARD)
    assert (tunable.name, features) == ("adamw_", {})
    (job,) = plan([case], CARD)
    assert len(job.candidates) == len({c.launch for c in job.candidates}) and all(
        len(c.recipes) == 1 for c in job.candidates
    )
    assert dict(job.candidates[0].recipes[0].signature)["master_ptr"] == "*fp32"


@pytest.mark.parametrize("label", CASES)
def test_every_case_can_be_made_run_and_compared(label: str) -> None:
    case = CASES[label]
    cpu = torch.device("cpu")
    outputs, references = (tensors_of(call(case.make(cpu, 3))) for call in (case.run, case.reference))
    again = case.make(cpu, 3)
    for name, x in case.make(cpu, 3).items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(x.view(torch.uint8), again[name].view(torch.uint8)), (
                f"{name} is not the same for one seed"
            )
    assert gross_error(outputs, distances(outputs, references)) == ""
    assert case.num_bytes > 0 and case.num_flops > 0


@pytest.mark.parametrize("label", CASES)
def test_every_case_asks_for_a_decision_whose_candidates_are_many(label: str) -> None:
    jobs = plan([CASES[label]], CARD)
    assert jobs, "a case that no tunable depends on is of no use to the tuner"
    for job in jobs:
        assert len(job.candidates) > 1, job.key
        assert not [c.refused for c in job.candidates if c.refused], job.key
        assert all(candidate.recipes for candidate in job.candidates), job.key


def test_a_name_that_nothing_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no cases for nonsense; families: .*adamw.*; operations: .*adamw_"):
        all_cases([MODELS["tiny"]], torch.float32, ["nonsense"])
    assert all_cases([MODELS["tiny"]], torch.float32, ["adamw_"]).keys() == {"adamw"}


def test_two_models_share_a_case() -> None:
    twice = [MODELS["tiny"], replace(MODELS["tiny"], name="other")]
    once = all_cases(twice[:1], torch.float32, ["adamw"])
    assert [c.label for c in all_cases(twice, torch.float32, ["adamw"])["adamw"]] == [c.label for c in once["adamw"]]


def test_shapes_only_computes_nothing_and_knows_every_shape() -> None:
    with ShapesOnly():
        x, w = torch.empty(2**20, 2**12), torch.empty(2**17, 2**12)
        logits = x @ w.t()  # 9e14 flops, 256 GiB
        logits.mul_(2)
        assert logits.shape == (2**20, 2**17) and logits[:5].stride() == (2**17, 1)
        y = torch.nn.functional.layer_norm(x[::2].float(), (2**12,))
        assert y.shape == (2**19, 2**12) and y.dtype == torch.float32
        assert torch.zeros(2**36).shape == (2**36,)
        assert logits.sum().item() == 1
        chunks = [chunk.shape for chunk in torch.split(x, 2**19)]
        assert chunks == [(2**19, 2**12)] * 2
        out = torch.empty(4)
        assert torch.add(out, 1, out=out) is out
        torch._foreach_add_([out], 1.0)
        wanted = x.new_ones(3, requires_grad=True)
        (wanted * 2).sum().backward()
        assert wanted.grad.shape == (3,)


def test_shapes_only_hands_our_ops_to_their_launchers() -> None:
    state = {"step": 1, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    p, m, v, g = (torch.ones(100) for _ in range(4))
    with recording(CARD) as launched, ShapesOnly():
        adamw_(p, m, v, g, **state)
    assert [one.kernel.__name__ for one in launched] == ["_adamw_kernel"] and p.sum() == 100
    adamw_(p, m, v, g, **state)
    assert p.sum() < 100, "without them a CPU tensor takes the reference"


def test_draws_are_the_same_for_a_seed_and_free_where_nobody_looks() -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        draw = Draw(torch.device("cpu"), seed)
        return [draw.normal((3,), torch.bfloat16), draw.integers(0, 9, (4,)), draw.uniform((2,), torch.float32)]

    assert all(map(torch.equal, drawn(1), drawn(1))) and not all(map(torch.equal, drawn(1), drawn(2)))
    assert Draw(torch.device("cpu"), 0).zeros((5,), torch.float32).sum() == 0
    with unfilled():
        assert [x.shape for x in drawn(1)] == [(3,), (4,), (2,)]


def test_gradients_are_autograds() -> None:
    x, w, g = torch.randn(4), torch.randn(4), torch.ones(4)
    dx, dw = gradients(lambda x, w, power: x**power * w, {"x": x, "w": w}, g, power=2)
    assert torch.allclose(dx, 2 * x * w) and torch.allclose(dw, x**2)


def test_labels_name_everything() -> None:
    case = replace(toy_case(7), variant="causal", direction="backward")
    assert case.label == "double (causal) backward n=7 fp32"
    assert isinstance(case, Case)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_whole(name: str) -> None:
    model = load_shapes(name)
    assert (
        model.heads % model.kv_heads == 0 and model.num_block_params > 0 and model.tokens == tuple(sorted(model.tokens))
    )


def test_parameters_of_a_block_add_up() -> None:
    llama = MODELS["llama8b"]
    embeddings = 2 * llama.vocab * llama.hidden
    assert llama.num_block_params * llama.layers + embeddings == pytest.approx(8.03e9, rel=1e-3)


def test_shapes_from_files(tmp_path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        '{"hidden": 8, "ffn": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 4, "vocab": 11, "tokens": [3]}'
    )
    mine = load_shapes(str(path))
    assert (mine.name, mine.hidden, mine.tokens) == ("mine", 8, (3,))
    path.write_text(
        '{"model_type": "llama", "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2,'
        ' "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99, "rope_theta": 1e4}'
    )
    theirs = load_shapes(str(path))
    assert (theirs.ffn, theirs.kv_heads, theirs.head_dim, theirs.vocab) == (48, 2, 4, 99)
    path.write_text('{"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_inner": null}')
    gpt = load_shapes(str(path))
    assert (gpt.ffn, gpt.kv_heads, gpt.head_dim) == (64, 4, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list, must be an object"),
        ('{"hidden": 8, "wide": 3}', r"unknown \['wide'\], missing \['ffn'"),
        ('{"hidden_size": 16}', r"missing \['head_dim', 'heads'"),
        (
            '{"hidden": 8.5, "ffn": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 4, "vocab": 11}',
            "hidden is 8.5, must be a whole number of at least 1",
        ),
        (
            '{"hidden": 8, "ffn": 3, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 4, "vocab": 9, "tokens": [0]}',
            "tokens is 0",
        ),
    ],
)
def test_shapes_that_cannot_be(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_shapes(str(path))


def test_shapes_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="neither a model .gpt2, .*llama8b.* nor a file"):
        load_shapes("llama9000")


def function(x):
    y = helper(x)  # adds
    return y * FACTOR


def helper(x):
    return x + 1


FACTOR = 2


def test_a_source_hash_follows_what_runs_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    class Kernel:
        def __init__(self, fn):
            self.fn = fn

    monkeypatch.setitem(globals(), "helper", Kernel(helper))
    original = inspect.getsource
    changes: dict[str, tuple[str, str]] = {}

    def getsource(fn):
        old, new = changes.get(fn.__name__, ("", ""))
        return original(fn).replace(old, new) if old else original(fn)

    monkeypatch.setattr(inspect, "getsource", getsource)
    before = source_hash(Kernel(function))
    changes["function"] = ("# adds", "# what it does is add\n    # one")
    assert source_hash(Kernel(function)) == before, "a comment is not the kernel"
    changes["function"] = ("helper(x)", "helper(\n        x)")
    assert source_hash(Kernel(function)) == before, "nor is a line break"
    changes["function"] = ("y * FACTOR", "y / FACTOR")
    assert source_hash(Kernel(function)) != before
    changes.clear()
    changes["helper"] = ("x + 1", "x + 2")
    assert source_hash(Kernel(function)) != before, "what it calls is part of it"
    changes.clear()
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert source_hash(Kernel(function)) != before, "and so are its module's numbers"


def test_sources_are_of_real_kernels() -> None:
    planning.import_all_tunables()
    sources = {name: tunable.source for name, tunable in tuned.TUNABLES.items() if tunable.kernels}
    assert len(sources["adamw_"]) == 16 and sources["adamw_"] != sources["sum_of_squares"]
    assert HUNGRY.source != TOY.source
