"""Unknown keys, comments, misplaced keys, and the optimizer's and scheduler's own parameters."""

import warnings

import pytest

from tritonspeed.config import ConfigWarning, load


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"zero_optimization": {"stages": 3}}, "zero_optimization.stages is not a key .*did you mean 'stage'"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean 'overlap_comm'"),
        ({"zero_optimization": {"stage3_max_live_params": 1}}, "did you mean 'stage3_max_live_parameters'"),
        ({"fp16": {"enable": True}}, "fp16.enable is not a key .*did you mean 'enabled'"),
        ({"zero_optimization": {"gradient_clipping": 1}}, "it belongs at the top level"),
        ({"zero_optimization": {"nvme_path": "/nvme"}}, "it belongs inside zero_optimization.offload_"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "did you mean 'device'"),
        ({"hybrid_engine": {"enabled": False, "xyz": 1}}, "hybrid_engine.xyz is not a key of hybrid_engine"),
    ],
)
def test_unknown_key_in_a_block_is_an_error_with_the_nearest_name(tree, message):
    with pytest.raises(ValueError, match=message):
        load(tree)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gradient_cliping", "did you mean 'gradient_clipping'"),
        ("zero_optimisation", "did you mean 'zero_optimization'"),
        ("stage3_max_live_parameters", "it belongs inside zero_optimization"),
        (
            "zero_optimization.reduce_bucket_size",
            "a dot does not descend, write zero_optimization: {reduce_bucket_size",
        ),
        ("qwertyuiop", "unknown key, it has no effect"),
    ],
)
def test_unknown_key_at_the_top_warns_with_the_nearest_name_and_is_answered(name, message):
    with pytest.warns(ConfigWarning, match=message):
        config = load({name: 1, "train_batch_size": 4})
    (row,) = [each for each in config.resolve(1).answers() if each.key == name]
    assert (row.verdict, row.given) == ("inert", 1)
    assert message.split(",")[0] in row.note


def test_comments_pass_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load({"_comment": "x", "//": 1, "#x": 2, "zero_optimization": {"_why": "y", "stage": 1}})
    assert config.zero_optimization.stage == 1
    assert [each.key for each in config.answers() if each.given is not None] == ["zero_optimization.stage"]


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ValueError, match="3 mistakes") as caught:
        load({"zero_optimization": {"stage": 7, "stagee": 1}, "gradient_clipping": "x"})
    assert all(word in str(caught.value) for word in ("stage = 7", "stagee", "gradient_clipping = 'x'"))


@pytest.mark.parametrize(
    ("name", "canonical"),
    [("adamw", "AdamW"), ("ADAM", "Adam"), ("sgd", "SGD"), ("rmsprop", "RMSprop"), ("NAdam", "NAdam")],
)
def test_optimizer_names_are_matched_without_case(name, canonical):
    assert load({"optimizer": {"type": name}}).optimizer.type == canonical


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("AdamW", {"max_grad_norm": 1.0}, "set gradient_clipping: 1.0"),
        ("SGD", {"max_grad_norm": 0.5}, "set gradient_clipping: 0.5"),
        ("AdamW", {"learning_rate": 1}, "not a parameter of AdamW"),
        ("AdamW", {"beta": [0.9, 0.95]}, "did you mean 'betas'"),
        ("AdamW", {"betas": [0.9]}, "must be 2 numbers, like \\[0.9, 0.999\\]"),
        ("AdamW", {"betas": 0.9}, "must be 2 numbers"),
        ("AdamW", {"lr": "fast"}, "must be a number"),
        ("AdamW", {"lr": float("nan")}, "must be a number"),
        ("AdamW", {"lr": True}, "must be a number"),
        ("Adam", {"amsgrad": True}, "add torch_adam: true"),
        ("Adam", {"maximize": True}, "not a parameter of Adam"),
        ("SGD", {"betas": [0.9, 0.99]}, "not a parameter of SGD"),
        ("AdamX", {}, "unknown, did you mean 'Adamax'\\? Known: ASGD"),
    ],
)
def test_mistakes_in_the_optimizer(kind, params, message):
    with pytest.raises(ValueError, match=message):
        load({"optimizer": {"type": kind, "params": params}})


def test_an_optimizer_without_a_type():
    assert load({"optimizer": {}}).optimizer is None
    assert load({"optimizer": None}).optimizer is None
    with pytest.raises(ValueError, match="without optimizer.type"):
        load({"optimizer": {"params": {"lr": 1}}})


def test_numbers_in_quotes_and_torchs_options():
    config = load({"optimizer": {"type": "AdamW", "params": {"lr": "1e-5", "torch_adam": True, "amsgrad": True}}})
    assert config.optimizer.params == {"lr": 1e-5, "torch_adam": True, "amsgrad": True}
    assert load({"optimizer": {"type": "SGD", "params": {"maximize": True}}}).optimizer.params == {"maximize": True}


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmUp", {}, "unknown, did you mean 'WarmupLR'"),
        ("WarmupLR", {"total_num_steps": 10}, "not a parameter of WarmupLR"),
        ("WarmupDecayLR", {"warmup_steps": 10}, "did you mean 'warmup_num_steps'"),
        ("LambdaLR", {}, "initialize\\(lr_scheduler"),
        ("StepLR", {"gama": 0.5}, "did you mean 'gamma'"),
    ],
)
def test_mistakes_in_the_scheduler(kind, params, message):
    with pytest.raises(ValueError, match=message):
        load({"scheduler": {"type": kind, "params": params}})


def test_per_group_rates_and_torchs_schedules():
    tree = {"scheduler": {"type": "warmuplr", "params": {"warmup_max_lr": [1e-3, 1e-4], "warmup_min_lr": [0, 0]}}}
    assert load(tree).scheduler.type == "WarmupLR"
    assert load({"scheduler": {"type": "StepLR", "params": {"step_size": 3}}}).scheduler.params == {"step_size": 3}
