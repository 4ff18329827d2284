"""The top level of a ds_config.json: every key, with type, default, unit and what it does here.

Where the blocks are: `blocks_zero`, `blocks_offload`, `blocks_precision`, `blocks_training`, `blocks_features`,
`blocks_monitoring`.
Until `Config.resolve` a field may hold the string "auto", whatever its annotation says.
"""

from dataclasses import dataclass
from typing import Any, Literal

from tritonspeed.config.blocks_features import (
    FEATURE_GATES,
    ActivationCheckpointing,
    Checkpoint,
    Compile,
    Elasticity,
    HybridEngine,
    ProgressiveLayerDrop,
    TensorParallel,
)
from tritonspeed.config.blocks_monitoring import (
    Comet,
    CommsLogger,
    CsvMonitor,
    FlopsProfiler,
    JsonlMonitor,
    Tensorboard,
    Timers,
    Trackio,
    Wandb,
)
from tritonspeed.config.blocks_offload import Aio
from tritonspeed.config.blocks_precision import Bf16, DataTypes, Fp16, TorchAutocast
from tritonspeed.config.blocks_training import Optimizer, Scheduler
from tritonspeed.config.blocks_zero import ZeroOptimization
from tritonspeed.config.keys import Dtype, above, block, key, present

OFF = "nothing in it is switched on"


def _clipping_note(norm: Any) -> str:
    """gradients are scaled down to this global norm; 0 is off. 1.0 is DeepSpeed's default since June 2026, 0 before"""
    if norm == 0:
        return "gradients are not clipped"
    return f"gradients are scaled down to a global norm of {norm}"


def _prescaled(config: Any) -> str | None:
    """acts without prescale_gradients, which divides by everything before the exchange"""
    return "prescale_gradients divides by everything before the exchange" if config.prescale_gradients is True else None


@dataclass(frozen=True)
class Knobs:
    """Every key of a ds_config.json. `Config` adds where the values came from, and what to do with them."""

    train_batch_size: int | None = key(
        None, "samples per optimizer step over all ranks = micro batch × accumulation × world", always=True
    )
    train_micro_batch_size_per_gpu: int | None = key(
        None, "samples per forward on one rank", auto="1, unless the other two imply it", always=True
    )
    gradient_accumulation_steps: int | None = key(
        None, "forwards per optimizer step", auto="1, unless the other two imply it", always=True
    )
    managed_gradient_accumulation: bool = key(True, "count the boundary here; false: every step() applies an update")
    gradient_clipping: float = key(1.0, _clipping_note, low=0, always=True)
    steps_per_print: float | None = key(None, "optimizer steps between two reports; null or inf is never", unit="steps")
    wall_clock_breakdown: bool = key(
        False, "log where a step's time goes, every steps_per_print: by unit computing, waiting, sending; by rank"
    )
    dataloader_drop_last: bool = key(False, "drop the last, smaller batch of initialize(training_data=...)")

    zero_optimization: ZeroOptimization = block(ZeroOptimization, "sharding")
    fp16: Fp16 = block(Fp16, "half precision")
    bf16: Bf16 = block(Bf16, "bfloat16", old=("bfloat16",))
    torch_autocast: TorchAutocast = block(TorchAutocast, "torch.autocast")
    data_types: DataTypes = block(DataTypes, "other types")
    optimizer: Optimizer | None = block(Optimizer, "the optimizer", absent=True)
    scheduler: Scheduler | None = block(Scheduler, "the schedule", absent=True)

    communication_data_type: Dtype | None = key(
        None, "type in which gradients travel; null means the type they have. The sum is always fp32"
    )
    prescale_gradients: bool = key(
        False, "divide before the exchange", inert="the ranks' sum is taken in fp32, where neither order overflows"
    )
    gradient_predivide_factor: float = key(
        1.0, "divide by this before the exchange", inert="the ranks' sum is taken in fp32: dividing early gains nothing"
    )
    gradient_allreduce_op: Literal["mean", "sum"] = key("mean", "mean or sum of the ranks' gradients, at any stage")
    zero_allow_untested_optimizer: bool = key(
        False, "allow any torch optimizer", inert="any elementwise torch optimizer is allowed"
    )
    zero_force_ds_cpu_optimizer: bool = key(
        True,
        "insist on DeepSpeed's CPU optimizer",
        inert="any elementwise optimizer is offloaded, torch's too: there is none to insist on",
    )
    sparse_gradients: bool = key(
        False, "reduce embeddings' gradients as rows", inert="they are reduced densely: the same sums, more bytes"
    )
    seq_parallel_communication_data_type: Dtype | None = key(
        None,
        "type of sequence parallel exchanges",
        aliases=("seq_parallel_comm_data_type",),
        inert="acts only with sequence_parallel_size above 1",
    )
    sequence_parallel_size: int = key(
        1,
        "ranks a sequence is split over",
        refuse=above(1, use="sequence parallelism is not built; set it to 1"),
        low=1,
    )
    data_parallel_size: int | None = key(None, "must equal the world size, as no other axis is built", low=1)

    tensor_parallel: TensorParallel = block(TensorParallel, "tensor parallelism")
    expert_parallel: dict[str, Any] = key({}, "expert parallelism", inert=OFF, refuse=FEATURE_GATES["expert_parallel"])
    hybrid_engine: HybridEngine = block(HybridEngine, "training and generation")
    activation_checkpointing: ActivationCheckpointing = block(
        ActivationCheckpointing, "DeepSpeed's checkpoint function"
    )
    compile: Compile = block(Compile, "compilation")
    checkpoint: Checkpoint = block(Checkpoint, "checkpoints")
    aio: Aio = block(Aio, "NVMe requests")
    elasticity: Elasticity = block(Elasticity, "elastic batch sizes")
    progressive_layer_drop: ProgressiveLayerDrop = block(ProgressiveLayerDrop, "stochastic depth")
    weight_quantization: dict[str, Any] = key(
        {},
        "quantised weights for inference",
        inert=OFF,
        refuse=present("comes with the inference work; remove the block (weights keep their type)"),
    )
    sparse_attention: dict[str, Any] = key(
        {},
        "block-sparse attention",
        inert=OFF,
        refuse=present("not built; remove the block, and choose attention in the model"),
    )
    amp: dict[str, Any] = key({}, "Apex AMP", inert=OFF, refuse=FEATURE_GATES["amp"])
    autotuning: dict[str, Any] = key({}, "search of settings", inert=OFF, refuse=FEATURE_GATES["autotuning"])
    data_efficiency: dict[str, Any] = key(
        {}, "data sampling and routing", inert=OFF, refuse=FEATURE_GATES["data_efficiency"]
    )
    curriculum_learning: dict[str, Any] = key(
        {}, "the curriculum block before data_efficiency", inert=OFF, refuse=FEATURE_GATES["curriculum_learning"]
    )
    compression_training: dict[str, Any] = key(
        {}, "quantisation and pruning in training", inert=OFF, refuse=FEATURE_GATES["compression_training"]
    )
    eigenvalue: dict[str, Any] = key({}, "curvature estimate", inert=OFF, refuse=FEATURE_GATES["eigenvalue"])
    quantize_training: dict[str, Any] = key(
        {}, "mixture of quantisation", inert=OFF, refuse=FEATURE_GATES["quantize_training"]
    )
    nebula: dict[str, Any] = key({}, "checkpoint service", inert=OFF, refuse=FEATURE_GATES["nebula"])
    datastates_ckpt: dict[str, Any] = key(
        {},
        "checkpoint engine",
        inert=OFF,
        refuse=present("a checkpoint engine that is not supported; remove the block"),
    )
    pipeline: dict[str, Any] = key(
        {}, "pipeline engine", inert="acts only on a PipelineModule, which does not exist here"
    )
    graph_harvesting: bool = key(False, "CUDA graphs of short kernels", inert="not built; numbers do not depend on it")
    use_data_before_expert_parallelism: bool = key(False, "order of mesh axes", inert="there is one mesh axis")

    tensorboard: Tensorboard = block(Tensorboard, "TensorBoard")
    wandb: Wandb = block(Wandb, "Weights & Biases")
    csv_monitor: CsvMonitor = block(CsvMonitor, "CSV files")
    jsonl_monitor: JsonlMonitor = block(JsonlMonitor, "a line of JSON for each step")
    comet: Comet = block(Comet, "Comet")
    trackio: Trackio = block(Trackio, "Trackio")
    comms_logger: CommsLogger = block(CommsLogger, "log of collectives")
    flops_profiler: FlopsProfiler = block(FlopsProfiler, "profiler")
    timers: Timers = block(Timers, "timers")
    memory_breakdown: bool = key(False, "print memory", inert="engine.last_step.peak_bytes says it for every step")
    dump_state: bool = key(False, "print the engine's state", inert="engine.explain() prints the plan")
    disable_python_gc: bool = key(
        False, "no collection of cycles", inert="Python's collector is the program's own: call gc.disable()"
    )
    disable_allgather: bool = key(False, "debug", inert="without the all-gather parameters would be stale")
    vocabulary_size: int | None = key(
        None, "warn if not a multiple of 8", inert="the model knows its vocabulary", low=1
    )
    log_level: str | None = key(None, "DeepSpeed's log level", inert="set the level of Python's logging instead")
    comms_config: dict[str, Any] = key(
        {}, "not a key of DeepSpeed, though some configs carry it", inert="DeepSpeed never read it; see comms_logger"
    )
    monitor_config: dict[str, Any] = key(
        {},
        "not a key of DeepSpeed, though some configs carry it",
        inert="DeepSpeed never read it; see tensorboard, wandb and csv_monitor",
    )
