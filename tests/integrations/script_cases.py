"""The scripts, with their arguments and configs, that run here and under real DeepSpeed with the same numbers.

`tests/integrations` runs each case under tritonspeed and compares its record with the one that real DeepSpeed wrote
(`recorded/`, made by `python -m bench.peers.scripts --record`); that bench also runs both side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
RECORDED = Path(__file__).parent / "recorded"


@dataclass(frozen=True)
class Case:
    """One run of one script on two ranks.

    Attributes:
        name: unique; names the record.
        script: file in ``scripts/``.
        config: its ds_config.json.
        arguments: of the script, besides --deepspeed and --out.
        no_peer: why real DeepSpeed cannot run it here; "" where it can.
        close: decimals to which figures agree with real DeepSpeed's, where a reason (``why``) keeps them from four.
        why: that reason.
        environment: variables of the run.
        flags: what stands before the config's path.
    """

    name: str
    script: str
    config: dict[str, Any]
    arguments: tuple[str, ...] = ()
    no_peer: str = ""
    close: int = 4
    why: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ("--deepspeed",)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A config as they are commonly written: everything "auto"."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **more,
    }


def with_auto(stage: int, schedule: str | None, **more: Any) -> dict[str, Any]:
    """Optimizer, and schedule where one is named, in the config, "auto"."""
    adamw = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    if schedule is None:
        return zero(stage, optimizer=adamw, **more)
    keys = {
        "WarmupLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"),
        "WarmupDecayLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"),
        "WarmupCosineLR": ("warmup_num_steps", "total_num_steps"),
    }[schedule]
    return zero(stage, optimizer=adamw, scheduler={"type": schedule, "params": dict.fromkeys(keys, "auto")}, **more)


def scheduled(stage: int, schedule: str, **params: Any) -> dict[str, Any]:
    """A schedule in the config; the optimizer is Hugging Face's."""
    return zero(stage, scheduler={"type": schedule, "params": params})


_OFFLOAD = ("offload_optimizer", "offload_param")


def offloaded(device: str, path: Any = None, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """Stage 3 with parameters and optimizer on ``device``; NVMe's in the folder ``path``."""
    config = zero(3) if like is None else like
    place = {"device": device, "pin_memory": True, **({} if path is None else {"nvme_path": str(path)})}
    return {**config, "zero_optimization": {**config["zero_optimization"]} | dict.fromkeys(_OFFLOAD, place)}


def unclipped(config: dict[str, Any]) -> dict[str, Any]:
    """Without a word on clipping."""
    return {key: value for key, value in config.items() if key != "gradient_clipping"}


def ungathered(config: dict[str, Any]) -> dict[str, Any]:
    """Whose saved weights stay in shards."""
    shared = {**config["zero_optimization"], "stage3_gather_16bit_weights_on_model_save": False}
    return {**config, "zero_optimization": shared}


def trainer(name: str, config: dict[str, Any], *arguments: str, script: str = "causal", **more: Any) -> Case:
    """A run of a Trainer script."""
    return Case(f"trainer_{name}", f"trainer_{script}.py", config, arguments, **more)


_BF16 = {"close": 3, "why": "DeepSpeed rounds averaged gradients to bf16; here they stay fp32 until the step"}
_IN_BF16 = ("--bf16", "--learning_rate=1e-3")  # Adam at 1e-2 makes of a rounding, in three steps, what is seen
_UNEVEN = ("--max_steps=-1", "--num_train_epochs=2", "--samples=23")  # 6 micro-batches of a rank, the last one short
_SAVED = ("--save_strategy=steps", "--save_steps=1", "--eval_strategy=steps", "--eval_steps=1", "--save_total_limit=3")
_BEST = (*_SAVED, "--load_best_model_at_end", "--per_device_eval_batch_size=2", "--samples=24")
_EVALUATED = ("--eval_strategy=steps", "--eval_steps=2", "--per_device_eval_batch_size=2")
TRAINER = [
    trainer("stage0-cosine", zero(0), "--lr_scheduler_type=cosine", "--warmup_steps=2", "--max_grad_norm=0.3"),
    trainer("stage1-linear", zero(1), "--generate"),
    trainer("stage1-warmup", with_auto(1, "WarmupLR"), *_UNEVEN, "--gradient_accumulation_steps=4", "--warmup_steps=3"),
    trainer("stage2-decay", with_auto(2, "WarmupDecayLR"), *_EVALUATED, *_IN_BF16, "--max_grad_norm=0.5", **_BF16),
    trainer("stage2-range", unclipped(scheduled(2, "LRRangeTest", lr_range_test_min_lr=1e-3)), "--max_grad_norm=0.2"),
    trainer("stage2-bert", with_auto(2, None), "--model=bert", "--weight_decay=0.1", script="classify"),
    trainer(
        "stage3-gpt2",
        unclipped(with_auto(3, None)),
        *_UNEVEN,
        *_EVALUATED,
        *("--model=gpt2", "--generate", "--gradient_checkpointing", "--gradient_accumulation_steps=4"),
    ),
    trainer("stage3-cosine", with_auto(3, "WarmupCosineLR"), *_IN_BF16, "--gradient_accumulation_steps=2", **_BF16),
    trainer(
        "stage3-mixtral",
        scheduled(3, "OneCycle", cycle_min_lr=1e-3, cycle_max_lr=1e-2, cycle_first_step_size=2, decay_step_size=1),
        "--model=mixtral",
        "--label_smoothing_factor=0.1",
    ),
    trainer("stage3-linear", zero(3), "--generate"),
    trainer("stage3-offload", offloaded("cpu"), "--generate"),
    trainer(
        "seq2seq-t5", with_auto(3, "WarmupLR"), "--model=t5", "--predict_with_generate", *_EVALUATED, script="seq2seq"
    ),
    trainer("seq2seq-bart", zero(2), "--model=bart", "--predict_with_generate", script="seq2seq"),
    trainer("pretrained-mixtral", zero(3), "--model=mixtral", "--max_steps=3", script="pretrained"),
    trainer("pretrained-gpt2", with_auto(3, None), "--model=gpt2", "--max_steps=3", script="pretrained"),
    trainer("again-stage3", zero(3), "--generate", "--max_steps=2", script="again"),
]


def accelerate(name: str, config: dict[str, Any], *arguments: str, script: str = "loop", **more: Any) -> Case:
    """A run of an Accelerate script; --cpu is what real DeepSpeed needs there."""
    return Case(f"accelerate_{name}", f"accelerate_{script}.py", config, ("--cpu", *arguments), **more)


_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "betas": [0.9, 0.95]}}  # all it fills in
_DECAY = with_auto(2, "WarmupDecayLR")["scheduler"]
_SUMMED_IN_FP32 = zero(
    2,
    optimizer=_ADAMW,
    scheduler=_DECAY,
    communication_data_type="fp32",
    data_types={"grad_accum_dtype": "fp32"},
)
ACCELERATE = [
    accelerate("loop-stage0", zero(0)),
    accelerate(
        "loop-stage2",
        _SUMMED_IN_FP32,
        *("--optimizer=config", "--mixed_precision=bf16", "--lr=1e-3"),
        close=3,
        why="DeepSpeed rounds summed gradients to bf16 even so: its first norm is 0.78006, that of the sum in fp64 and"
        " ours 0.77999",
    ),
    accelerate("loop-stage3", zero(3), "--pretrained"),
    accelerate("loop-stage3-callable", zero(3, optimizer=_ADAMW), "--optimizer=callable"),
    accelerate(
        "loop-stage1-overflow",
        zero(1, fp16={"enabled": "auto", "initial_scale_power": 22, "hysteresis": 1}),
        *("--mixed_precision=fp16", "--lr=1e-3"),
        no_peer="real DeepSpeed refuses fp16 on a CPU",
    ),
    accelerate("models-2-3-1", zero(2), script="models"),
    accelerate("models-3-0-3", zero(3), "--student=3", "--teacher=0", "--critic=3", script="models"),
]
RESUMED = [
    trainer("save-stage1", zero(1), *_BEST, "--lr_scheduler_type=cosine", script="save"),
    trainer("save-stage3", with_auto(3, "WarmupDecayLR"), *_BEST, "--gradient_accumulation_steps=4", script="save"),
    trainer("save-ungathered", ungathered(zero(3)), *_SAVED, "--max_steps=3", script="save"),
]
_RATE = {"warmup_num_steps": 3, "warmup_max_lr": 0.01, "warmup_type": "linear"}
_RUN = {"enabled": True, "job_name": "run"}
MONITORED = [
    Case(
        "monitors-stage2",
        "monitors.py",
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_print": 2,
            "wall_clock_breakdown": True,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": _RATE},
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": True},
            "csv_monitor": {**_RUN, "output_path": "csv"},
            "tensorboard": {**_RUN, "output_path": "events"},
            "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": "flops.txt"},
        },
    )
]


def peft(name: str, config: dict[str, Any], *arguments: str, script: str = "trainer", **more: Any) -> Case:
    """A run of a script with adapters."""
    return Case(f"peft_{name}", f"peft_{script}.py", config, arguments, **more)


def _loop(stage: int) -> dict[str, Any]:
    """For deepspeed.initialize itself."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 320},
    }


PEFT = [
    peft("lora-stage2", zero(2), "--checkpointing=reentrant", "--input_grads"),
    peft("lora-stage3", zero(3), "--pretrained", "--checkpointing=plain"),
    peft("head-stage3", zero(3), "--method=head", "--pretrained", "--checkpointing=reentrant", "--input_grads"),
    peft("adalora-stage2", _loop(2), script="loop"),
    peft("prompt-stage3", _loop(3), "--method=prompt", script="loop"),
]


def own_loop(name: str, script: str, config: dict[str, Any], *arguments: str) -> Case:
    """A run of a script that calls deepspeed.initialize itself, with the arguments of DeepSpeed's tutorials."""
    flags = ("--deepspeed", "--deepspeed_config")
    return Case(f"raw_{name}", f"raw_{script}.py", {**config}, arguments, flags=flags)


def sharded(stage: int, **more: Any) -> dict[str, Any]:
    """Everything sharded that the stage shards, however small."""
    return {"stage": stage, "stage3_param_persistence_threshold": 0, **more}


_CPU = {"offload_optimizer": {"device": "cpu"}}
RAW = [
    own_loop(
        "cifar",
        "cifar",
        {
            "train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "steps_per_print": 2000,
            "optimizer": {
                "type": "Adam",
                "params": {"lr": 1e-3, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
            },
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 5},
            },
            "gradient_clipping": 1.0,
            "prescale_gradients": False,
            "fp16": {"enabled": False},
            "wall_clock_breakdown": False,
            "zero_optimization": {"stage": 1, "allgather_partitions": True, "reduce_scatter": True},
        },
    ),
    own_loop(
        "gpt-stage3",
        "gpt",
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": sharded(3, **_CPU),
            "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
        },
    ),
    own_loop(
        "rlhf-stage3",
        "rlhf",
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.0}},
            "zero_optimization": sharded(3),
        },
    ),
]


def lightning(name: str, script: str, config: dict[str, Any], *arguments: str) -> Case:
    """A run of a Lightning script."""
    why = "Lightning gives DeepSpeed a device without a number on a CPU, and DeepSpeed refuses it"
    return Case(f"lightning_{name}", f"lightning_{script}.py", config, arguments, no_peer=why)


_FABRIC = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5}
LIGHTNING = [
    lightning("fit-stage2", "fit", {"zero_optimization": sharded(2), "zero_allow_untested_optimizer": True}),
    lightning(
        "fit-stage3",
        "fit",
        {"zero_optimization": sharded(3, **_CPU), "zero_allow_untested_optimizer": True},
        "--package=pytorch_lightning",
    ),
    lightning("fabric-stage2", "fabric_loop", {**_FABRIC, "zero_optimization": sharded(2)}),
    lightning("fabric-stage3", "fabric_loop", {**_FABRIC, "zero_optimization": sharded(3)}),
]


def trl(name: str, *arguments: str, script: str = "", **more: Any) -> Case:
    """A run of one of TRL's trainers: "sft-stage3"."""
    trainer, stage = name.split("-stage")
    return Case(f"trl_{name}", f"trl_{script or trainer}.py", zero(int(stage)), arguments, **more)


_IN_FLIGHT = "with ds3_gather_for_generation=False, DeepSpeed 0.19.8 stops: Cannot partition a param in flight"
TRL = [
    *[trl(f"{name}-stage{stage}") for name in ("sft", "reward", "dpo", "kto") for stage in (2, 3)],
    *[trl(f"grpo-stage{stage}", "--whole", script="online") for stage in (2, 3)],
    *[trl(f"rloo-stage{stage}", "--whole", "--algorithm=RLOO", script="online") for stage in (2, 3)],
    trl("sft-lora-stage3", "--lora", script="sft"),
    trl("dpo-asked-once-stage3", "--precompute", script="dpo"),
    trl("grpo-in-parts-stage3", script="online", no_peer=_IN_FLIGHT),
]
CASES = [*TRL, *RAW, *LIGHTNING, *PEFT, *MONITORED, *RESUMED, *ACCELERATE, *TRAINER]
