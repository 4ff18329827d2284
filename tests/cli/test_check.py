"""`tritonspeed check`: the table, its order, its exit status."""

import argparse
import json

import pytest

from tritonspeed.cli.check import add_arguments, run

PASSES = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
REFUSED = {
    "train_batch_size": 8,
    "gradient_clippin": 1,
    "steps_per_print": float("inf"),
    "optimizer": {"type": "Lamb"},  # needs whole tensors, which an offloaded step does not see
    "zero_optimization": {"stage": 3, "cpu_offload": True, "zero_quantized_weights": True},
}


@pytest.fixture
def check(tmp_path, capsys):
    def call(tree, *options):
        path = tmp_path / "ds_config.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        status = run(parser.parse_args([str(path), *options]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_a_config_that_passes(check):
    status, out, err = check(PASSES, "--world", "4", "--hidden-size", "64")
    assert (status, err) == (0, "")
    assert "on 4 ranks" in out
    assert "hidden size 64²" in out
    assert "4096" in out


def test_refused_keys_come_first_and_fail(check):
    status, out, _ = check(REFUSED)
    assert status == 1
    lines = out.splitlines()
    first = [index for index, line in enumerate(lines) if "refused" in line and "│" in line]
    others = [index for index, line in enumerate(lines) if "honoured" in line or "inert" in line]
    assert len(first) == 2
    assert max(first) < min(others)
    assert "zero_optimization.cpu_offload" in lines[first[0]] + lines[first[1]]
    assert "did you mean 'gradient_clipping'" in " ".join(out.split())
    assert "2 refused" in lines[-1]


def test_json(check):
    status, out, _ = check(REFUSED, "--json")
    report = json.loads(out)
    assert (status, report["world_size"], report["errors"]) == (1, 1, [])
    verdicts = [each["verdict"] for each in report["answers"]]
    assert verdicts[:2] == ["refused", "refused"]
    assert "refused" not in verdicts[2:]
    rows = {each["key"]: each for each in report["answers"]}
    assert rows["steps_per_print"]["resolved"] == "inf"
    assert rows["zero_optimization.cpu_offload"] | {"note": ""} == {
        "key": "zero_optimization.cpu_offload",
        "given": True,
        "resolved": "cpu",
        "verdict": "refused",
        "note": "",
    }


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"zero_optimization": {"stagee": 3}}, "did you mean 'stage'"),
        ('{"train_batch_size": 1, "train_batch_size": 2}', "stands twice"),
        ("{", "not valid JSON"),
    ],
)
def test_a_mistake_is_an_error_without_a_table(check, tree, message):
    status, out, err = check(tree)
    assert (status, out) == (1, "")
    assert message in err
    status, out, _ = check(tree, "--json")
    assert status == 1
    assert message in json.loads(out)["errors"][0]


def test_numbers_that_do_not_multiply_out_still_show_the_table(check):
    tree = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    status, out, err = check(tree, "--world", "2")
    assert status == 1
    assert "train_batch_size" in out
    assert "32 ≠ micro batch 4 × accumulation 2 × world 2 = 16" in err


def test_the_world_size_is_what_three_numbers_imply(check):
    tree = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    status, out, _ = check(tree)
    assert status == 0
    assert "on 4 ranks" in out


def test_a_world_of_no_ranks_is_refused(check):
    with pytest.raises(ValueError, match="--world 0 must be at least 1"):
        check(PASSES, "--world", "0")


def test_the_new_name_of_an_old_key_is_never_cut(check):
    zero = {"stage": 3, "cpu_offload": True, "stage3_gather_fp16_weights_on_model_save": True}
    _, out, _ = check({"train_batch_size": 8, "zero_optimization": zero})
    assert "zero_optimization.offload_optimizer.device:" in out
    assert "zero_optimization.gather_16bit_weights_on_model_save:" in out
    assert not [line for line in out.splitlines() if "│" in line and "…" in line]
