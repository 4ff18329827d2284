"""Each key is honoured, mapped, inert or refused; a refusal stops the run and says what to do instead."""

import pytest

from tritonspeed.config import load
from tritonspeed.config.config import Config
from tritonspeed.config.keys import specs

BATCH = {"train_micro_batch_size_per_gpu": 1}
AT_STAGE_3 = {"zero_optimization": {"stage": 3}}


def nested(path, value):
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def merged(one, other):
    both = dict(one)
    for name, value in other.items():
        both[name] = (
            merged(both[name], value) if isinstance(value, dict) and isinstance(both.get(name), dict) else value
        )
    return both


REFUSED = [
    ("zero_optimization.offload_optimizer.device", "nvme", "set nvme_path to a folder"),
    ("zero_optimization.offload_param.device", "nvme", "set nvme_path to a folder"),
    ("zero_optimization.legacy_stage1", True, "one implementation"),
    ("zero_optimization.zero_hpz_partition_size", 8, "set it to 1"),
    ("zero_optimization.zero_quantized_weights", True, "set it to false"),
    ("zero_optimization.zero_quantized_gradients", True, "set it to false"),
    ("zero_optimization.zero_quantized_nontrainable_weights", True, "set it to false"),
    ("zero_optimization.mics_shard_size", 4, "set it to -1"),
    ("zero_optimization.zenflow", {"topk_ratio": 0.1}, "remove the block"),
    ("fp16.fp16_master_weights_and_grads", True, "set it to false"),
    ("bf16.bf16_master_weights_and_grads", True, "set it to false"),
    ("bf16.bf16_optimizer_states", True, 'set it to false, and optimizer.params.state to "bf16"'),
    ("data_types.param_dtype", "bf16", "use fp16, bf16"),
    ("data_types.buffer_dtype", "fp32", "before initialize"),
    ("tensor_parallel.autotp_size", 2, "tensor parallel work"),
    ("tensor_parallel.tp.tp_size", 2, "tensor parallel work"),
    ("sequence_parallel_size", 2, "set it to 1"),
    ("expert_parallel", {"enabled": True, "autoep_size": 2}, "enabled to false"),
    ("hybrid_engine.enabled", True, "RLHF work"),
    ("compile.offload_activation", True, "cpu_checkpointing to true"),
    ("compile.offload_opt_states", True, "offload_optimizer.device to cpu"),
    ("compile.offload_parameters", True, "offload_param.device to cpu"),
    ("checkpoint.use_node_local_storage", True, "save where all can write"),
    ("elasticity.enabled", True, "give the batch sizes"),
    ("progressive_layer_drop.enabled", True, "set it to false"),
    ("weight_quantization", {"post_init_quant": {"fc": {"num_bits": 4}}}, "inference work"),
    ("sparse_attention", {"mode": "fixed"}, "remove the block"),
    ("amp", {"enabled": True, "opt_level": "O1"}, "use bf16 or fp16"),
    ("autotuning", {"enabled": True}, "estimate"),
    ("data_efficiency", {"enabled": True}, "enabled to false"),
    ("curriculum_learning", {"enabled": True}, "enabled to false"),
    ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": True}}}, "enabled to false"),
    ("eigenvalue", {"enabled": True}, "enabled to false"),
    ("quantize_training", {"enabled": True}, "compute in bf16"),
    ("nebula", {"enabled": True}, "enabled to false"),
    ("datastates_ckpt", {"host_cache_size": 16}, "remove the block"),
    ("optimizer.type", "OneBitAdam", "Use AdamW"),
    ("optimizer.type", "OneBitLamb", "Use AdamW"),
    ("optimizer.type", "ZeroOneAdam", "Use AdamW"),
    ("optimizer.type", "MuAdam", "Use AdamW"),
    ("optimizer.type", "MuAdamW", "Use AdamW"),
    ("optimizer.type", "MuSGD", "Use SGD"),
    ("optimizer.type", "Adafactor", "whole matrices"),
    ("optimizer.type", "LBFGS", "closure"),
    ("optimizer.type", "SparseAdam", "sparse gradients"),
]


@pytest.mark.parametrize(("path", "value", "remedy"), REFUSED, ids=[f"{row[0]}-{i}" for i, row in enumerate(REFUSED)])
def test_refused_by_name_with_the_alternative(path, value, remedy):
    config = load(merged(BATCH | AT_STAGE_3, nested(path, value)))
    with pytest.raises(ValueError, match="the config asks for what is not supported") as caught:
        config.resolve(1)
    assert f"{path} = {value!r}: " in str(caught.value)
    assert remedy in str(caught.value)
    (row,) = [each for each in config.resolve(1, allow_refused=True).answers() if each.verdict == "refused"]
    assert (row.key, row.given) == (path, value)


def test_every_refusal_in_the_schema_is_tested():
    declared = {path for path, spec in specs(Config).items() if spec.key.refuse or spec.key.conflict}
    assert declared == {path for path, _, _ in REFUSED}


OFF = [
    ("zero_optimization.offload_optimizer", {"device": "none", "pin_memory": True, "ratio": 0.5}),
    ("zero_optimization.offload_param", {"device": None, "nvme_path": "/nvme"}),
    ("zero_optimization.zero_quantized_weights", False),
    ("zero_optimization.zero_hpz_partition_size", 1),
    ("zero_optimization.mics_shard_size", -1),
    ("zero_optimization.zenflow", None),
    ("zero_optimization.zeropp_loco_param", {"err_beta": 0.8, "reset_T": 1024}),
    ("tensor_parallel", {"autotp_size": 1, "tp": {"tp_size": 1, "tp_grain_size": 64}, "kernel_inject": False}),
    ("expert_parallel", {"enabled": False, "autoep_size": 2}),
    ("hybrid_engine", {"enabled": False, "max_out_tokens": 512, "pin_parameters": True}),
    ("activation_checkpointing", {"partition_activations": True, "number_checkpoints": 4, "profile": True}),
    ("activation_checkpointing", {"contiguous_memory_optimization": True, "synchronize_checkpoint_boundary": True}),
    ("compile", {"deepcompile": True, "passes": ["z3"]}),
    ("compile", {"disable": False, "backend": "inductor"}),
    ("compile", {"enabled": True, "backend": "inductor", "kwargs": {}}),
    ("checkpoint", {"tag_validation": "Warn", "load_universal": False, "writer": {"type": "MOCK"}}),
    ("elasticity", {"enabled": False, "micro_batch_sizes": [2, 4]}),
    ("progressive_layer_drop", {"enabled": False, "theta": 0.5}),
    ("weight_quantization", {}),
    ("amp", {"enabled": False}),
    ("amp", {"enabled": "auto", "opt_level": "auto"}),
    ("autotuning", {"enabled": False, "fast": True}),
    ("data_efficiency", {"enabled": False, "seed": 1}),
    ("curriculum_learning", {"enabled": False, "curriculum_type": "seqlen"}),
    ("compression_training", {"sparse_pruning": {"shared_parameters": {"enabled": False}}}),
    ("eigenvalue", {"enabled": False}),
    ("quantize_training", {"enabled": False}),
    ("nebula", {"enabled": False}),
    ("datastates_ckpt", {"enabled": False}),
    ("tensorboard", {"enabled": False, "output_path": "logs", "job_name": "x"}),
    ("wandb", {"enabled": False, "project": "x", "group": None, "team": None}),
    ("csv_monitor", {"enabled": False, "output_path": "logs"}),
    ("jsonl_monitor", {"enabled": False, "job_name": "x"}),
    ("comet", {"enabled": False, "samples_log_interval": 10}),
    ("trackio", {"enabled": False, "project": "x"}),
    ("comms_logger", {"enabled": False, "prof_ops": ["all_reduce"]}),
    ("flops_profiler", {"enabled": False, "profile_step": 5}),
    ("timers", {"throughput": {"enabled": True, "synchronized": True}}),
    ("aio", {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True}),
    ("pipeline", {"stages": "auto"}),
    ("comms_config", {"verbose": False}),
    ("monitor_config", {"enabled": True, "csv_monitor": {"enabled": False}}),
    ("sparse_gradients", True),
    ("zero_allow_untested_optimizer", True),
    ("zero_force_ds_cpu_optimizer", False),
    ("memory_breakdown", True),
    ("dump_state", True),
    ("graph_harvesting", True),
    ("vocabulary_size", 50257),
    ("log_level", "info"),
]


@pytest.mark.parametrize(("path", "value"), OFF, ids=[f"{row[0]}-{i}" for i, row in enumerate(OFF)])
def test_off_or_harmless_passes_with_a_reason_for_each_key(path, value):
    config = load(merged(BATCH, nested(path, value))).resolve(1)
    rows = [each for each in config.answers() if each.key.startswith(path)]
    assert rows or not value
    assert all(each.note for each in rows)
    assert not [each for each in rows if each.verdict == "refused"]
    effective = {each.key.rpartition(".")[2] for each in rows if each.verdict == "honoured"}
    # what is honoured here is the switch itself, in its off position
    switches = {"device", "enabled", "autotp_size", "tp_size", "tag_validation", "load_universal"}
    switches |= {"zero_quantized_weights", "zero_hpz_partition_size", "mics_shard_size", "zenflow"}
    assert effective <= switches


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_keys_of_another_stage_are_inert_and_say_which_stage(stage):
    acts = {
        "stage3_prefetch_bucket_size": (3,),
        "stage3_param_persistence_threshold": (3,),
        "stage3_max_live_parameters": (3,),
        "stage3_max_reuse_distance": (3,),
        "allgather_bucket_size": (1, 2),
        "sub_group_size": (1, 2, 3),
        "reduce_bucket_size": (0, 1, 2, 3),
    }
    config = load({**BATCH, "zero_optimization": {"stage": stage, **dict.fromkeys(acts, 10)}}).resolve(1)
    rows = {each.key.rpartition(".")[2]: each for each in config.answers()}
    for name, stages in acts.items():
        assert rows[name].verdict == ("honoured" if stage in stages else "inert"), name
        assert stage in stages or f"this is stage {stage}" in rows[name].note


def test_a_fixed_loss_scale_makes_the_dynamic_keys_inert():
    fp16 = {"enabled": True, "loss_scale": 128, "hysteresis": 2, "auto_cast": True}
    rows = {each.key: each for each in load({**BATCH, "fp16": fp16}).resolve(1).answers()}
    assert rows["fp16.hysteresis"].verdict == "inert"
    assert "fixed at 128" in rows["fp16.hysteresis"].note
    assert rows["fp16.auto_cast"].verdict == rows["fp16.loss_scale"].verdict == "honoured"


@pytest.mark.parametrize("on", [True, False])
def test_cpu_checkpointing_is_honoured(on):
    config = load({**BATCH, "activation_checkpointing": {"cpu_checkpointing": on}}).resolve(1)
    (row,) = [each for each in config.answers() if each.key == "activation_checkpointing.cpu_checkpointing"]
    assert row.verdict == "honoured"
    assert row.note.startswith("off: ") != on


def test_a_checkpoint_is_saved_in_the_background_by_either_name():
    for block in ({"async_save": True}, {"writer": {"type": "fast", "decoupled": True}}):
        config = load({**BATCH, "checkpoint": block}).resolve(1)
        assert config.checkpoint.saves_in_background
        rows = {each.key.rpartition(".")[2]: each.verdict for each in config.answers()}
        assert rows.get("async_save", rows.get("decoupled")) == "honoured" and rows.get("type", "inert") == "inert"
    assert not load({**BATCH, "checkpoint": {"writer": None}}).resolve(1).checkpoint.saves_in_background


@pytest.mark.parametrize("on", [True, False])
def test_what_happens_on_sigterm_acts_with_its_switch(on):
    block = {"save_on_sigterm": on, "exit_code": 85, "save_dir": "run"}
    rows = {e.key.rpartition(".")[2]: e for e in load({**BATCH, "checkpoint": block}).resolve(1).answers()}
    assert {rows["exit_code"].verdict, rows["save_dir"].verdict} == {"honoured" if on else "inert"}


@pytest.mark.parametrize("block", [{"keep_last": 0}, {"exit_code": 256}, {"verify": "some"}, {"writer": {"kind": 1}}])
def test_a_value_that_a_checkpoint_cannot_have_is_refused(block):
    with pytest.raises(ValueError, match="keep_last|exit_code|verify|kind"):
        load({**BATCH, "checkpoint": block})


def test_several_refusals_come_in_one_error():
    zero = {"stage": 3, "offload_param": {"device": "nvme"}, "offload_optimizer": {"device": "nvme"}}
    with pytest.raises(ValueError) as caught:
        load(
            {**BATCH, "zero_optimization": zero, "optimizer": {"type": "OneBitLamb", "params": {"max_coeff": 1}}}
        ).resolve(1)
    for word in ("offload_param.device = 'nvme'", "offload_optimizer.device = 'nvme'", "optimizer.type = 'OneBitLamb'"):
        assert word in str(caught.value)


def test_parameters_of_the_optimizer_are_answered_one_by_one():
    params = {"lr": "auto", "adam_w_mode": False, "fused": True, "betas": [0.9, 0.95]}
    rows = {e.key: e for e in load({**BATCH, "optimizer": {"type": "AdamW", "params": params}}).resolve(1).answers()}
    assert (rows["optimizer.params.lr"].given, rows["optimizer.params.lr"].resolved) == ("auto", 1e-3)
    assert rows["optimizer.params.betas"].verdict == "honoured"
    assert rows["optimizer.params.adam_w_mode"].verdict == "inert"
    assert "use type Adam" in rows["optimizer.params.adam_w_mode"].note
    assert rows["optimizer.params.fused"].verdict == "inert"


def test_answers_come_before_resolve_too():
    tree = {**BATCH, "zero_optimization": {"stage": "auto", "overlap_comm": "auto"}, "fp16": {"loss_scale": "auto"}}
    assert {each.key for each in load(tree).answers()} >= {"zero_optimization.stage", "fp16.loss_scale"}
