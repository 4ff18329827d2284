"""Blocks of features that change what is computed or where: parallelism, compilation, data, compression, checkpoints.

Most of them belong to later work. While a feature is off its block passes; when it is on, it is refused by name.
"""

from dataclasses import dataclass
from typing import Any, Literal

from tritonspeed.config.keys import Dtype, above, block, key, switched_on, unless

WITH_TENSOR_PARALLEL = "acts only with tensor_parallel.autotp_size above 1"
DIRECT_WRITER = "every rank writes its part past the page cache, several requests under way at once"
COMPILE_NOTE = "nothing is compiled for you: torch.compile the model or its blocks before initialize"


@dataclass(frozen=True)
class TensorParallelSize:
    """DeepSpeed's `tensor_parallel.tp`."""

    tp_size: int = key(
        1, "ranks a layer is split over", refuse=above(1, use="comes with the tensor parallel work; set it to 1"), low=0
    )
    tp_grain_size: int = key(1, "granularity of a split", inert=WITH_TENSOR_PARALLEL, low=1)


@dataclass(frozen=True)
class TensorParallel:
    """Automatic tensor parallelism."""

    autotp_size: int = key(
        0,
        "ranks a layer is split over; 0 and 1 split nothing",
        refuse=above(1, use="comes with the tensor parallel work; set it to 1 (ZeRO then uses all ranks)"),
        low=0,
    )
    dtype: Dtype | None = key(None, "type the model is converted to", inert=WITH_TENSOR_PARALLEL)
    tp_overlap_comm: bool = key(False, "overlap its all-reduces", inert=WITH_TENSOR_PARALLEL)
    tp: TensorParallelSize = block(TensorParallelSize, "sizes", aliases=("tensor_parallel",))
    vocab_parallel_lm_head: bool = key(False, "split the head over the vocabulary", inert=WITH_TENSOR_PARALLEL)
    vocab_parallel_ce_backend: str | None = key(None, "loss of a split head", inert=WITH_TENSOR_PARALLEL)
    injection_policy_tuple: list[str] | None = key(None, "layers to split", inert=WITH_TENSOR_PARALLEL)
    partition_config: dict[str, Any] | None = key(None, "rules of the split", inert=WITH_TENSOR_PARALLEL)
    preset_model: str | None = key(None, "named rules of the split", inert=WITH_TENSOR_PARALLEL)
    keep_module_on_host: bool = key(False, "load in host memory", inert=WITH_TENSOR_PARALLEL)
    replace_with_kernel_inject: bool = key(
        False, "inference kernels", aliases=("kernel_inject",), inert=WITH_TENSOR_PARALLEL
    )


@dataclass(frozen=True)
class HybridEngine:
    """Training and generation with one set of weights, for RLHF."""

    enabled: bool = key(
        False,
        "switch between training and generation",
        refuse=unless(False, use="comes with the RLHF work; set it to false (generate() runs on gathered units)"),
    )
    max_out_tokens: int = key(512, "longest generation", unit="tokens", inert="acts only with hybrid_engine.enabled")
    inference_tp_size: int = key(1, "tensor parallel ranks", inert="acts only with hybrid_engine.enabled")
    release_inference_cache: bool = key(False, "free the cache", inert="acts only with hybrid_engine.enabled")
    pin_parameters: bool = key(True, "page-locked parameters", inert="acts only with hybrid_engine.enabled")
    tp_gather_partition_size: int = key(8, "layers per gather", inert="acts only with hybrid_engine.enabled")
    enable_cuda_graph: bool = key(False, "CUDA graphs", inert="acts only with hybrid_engine.enabled")


@dataclass(frozen=True)
class ActivationCheckpointing:
    """What becomes of the inputs of checkpointed regions, ts.checkpointing's and torch.utils.checkpoint's alike."""

    partition_activations: bool = key(
        False,
        "divide saved inputs over the model parallel group",
        inert="there is one mesh axis: a model parallel group of one rank has nothing to divide",
    )
    cpu_checkpointing: bool = key(
        False,
        "inputs of checkpointed regions wait for backward in host memory, torch.utils.checkpoint's too; on a CPU that"
        " is the same memory",
    )
    contiguous_memory_optimization: bool = key(
        False, "one buffer for them", inert="host buffers have each input's exact size, and serve the next step again"
    )
    number_checkpoints: int | None = key(None, "how many", inert="nothing is laid out beforehand", low=0)
    synchronize_checkpoint_boundary: bool = key(False, "debug", inert="streams are ordered by events")
    profile: bool = key(
        False, "timers", inert="a timer would wait for the device; wall_clock_breakdown times forward and backward"
    )


@dataclass(frozen=True)
class Compile:
    """DeepCompile's block, and the block of DeepSpeed 0.14 (`enabled`/`disable`, `backend`, `kwargs`)."""

    deepcompile: bool = key(False, "compiler-inserted communication", inert=COMPILE_NOTE)
    free_activation: bool = key(False, "free activations early", inert="acts only with deepcompile")
    free_activation_threshold: int = key(
        10_485_760, "from this size on", unit="bytes", inert="acts only with deepcompile"
    )
    offload_activation: bool = key(
        False,
        "move activations to the host",
        refuse=unless(False, use="set it to false, and activation_checkpointing.cpu_checkpointing to true"),
    )
    offload_activation_pin_memory: bool = key(True, "page-locked", inert="acts only with deepcompile")
    offload_opt_states: bool = key(
        False,
        "move states to the host",
        refuse=unless(False, use="set it to false, and zero_optimization.offload_optimizer.device to cpu"),
    )
    offload_parameters: bool = key(
        False,
        "move parameters to the host",
        refuse=unless(False, use="set it to false, and zero_optimization.offload_param.device to cpu at stage 3"),
    )
    double_buffer: bool = key(True, "two gather buffers", inert="acts only with deepcompile")
    symmetric_memory: bool = key(False, "symmetric memory collectives", inert="acts only with deepcompile")
    debug_log: bool = key(False, "dump graphs", inert="acts only with deepcompile")
    sync_before_reduce: bool = key(False, "debug", inert="acts only with deepcompile")
    sync_after_reduce: bool = key(False, "debug", inert="acts only with deepcompile")
    sync_before_allgather: bool = key(False, "debug", inert="acts only with deepcompile")
    sync_after_allgather: bool = key(False, "debug", inert="acts only with deepcompile")
    keep_int_input_tensors: bool = key(True, "debug", inert="acts only with deepcompile")
    keep_all_input_tensors: bool = key(False, "debug", inert="acts only with deepcompile")
    passes: list[str] | None = key(None, "graph passes", inert="acts only with deepcompile")
    autoep_non_moe: bool = key(False, "compile around experts", inert="acts only with expert_parallel")
    enabled: bool = key(False, "DeepSpeed 0.14's switch", inert=COMPILE_NOTE)
    disable: bool = key(True, "an older switch, the other way round", inert=COMPILE_NOTE)
    backend: str | None = key(None, "torch.compile's backend", inert=COMPILE_NOTE)
    kwargs: dict[str, Any] = key({}, "torch.compile's arguments", inert=COMPILE_NOTE)


@dataclass(frozen=True)
class Elasticity:
    """Batch sizes that fit several world sizes."""

    enabled: bool = key(
        False,
        "choose batch sizes for the world at hand",
        refuse=unless(False, use="elastic batch sizes are not built; set it to false and give the batch sizes"),
    )
    max_train_batch_size: int = key(2000, "largest batch", inert="acts only with elasticity.enabled")
    micro_batch_sizes: list[int] = key([2, 4, 6], "candidates", inert="acts only with elasticity.enabled")
    min_gpus: int = key(1, "smallest world", inert="acts only with elasticity.enabled")
    max_gpus: int = key(10_000, "largest world", inert="acts only with elasticity.enabled")
    min_time: int = key(0, "between changes", unit="minutes", inert="acts only with elasticity.enabled")
    version: float = key(0.2, "of its rules", inert="acts only with elasticity.enabled")
    prefer_larger_batch: bool = key(True, "on a tie", inert="acts only with elasticity.enabled")
    ignore_non_elastic_batch_info: bool = key(False, "let it win", inert="acts only with elasticity.enabled")
    num_gpus_per_node: int = key(1, "for its rules", inert="acts only with elasticity.enabled")
    model_parallel_size: int = key(1, "for its rules", inert="acts only with elasticity.enabled")


def _with_sigterm(config: Any) -> str | None:
    """acts with checkpoint.save_on_sigterm"""
    return None if config.checkpoint.save_on_sigterm else "acts with checkpoint.save_on_sigterm"


@dataclass(frozen=True)
class CheckpointWriter:
    """DeepSpeed's `checkpoint.writer`."""

    type: Literal["FAST", "PYTHON", "MOCK"] = key("FAST", "what writes", inert=DIRECT_WRITER)
    decoupled: bool = key(False, "write while training goes on, as checkpoint.async_save does")
    io_buffer_size: int = key(64 * 2**20, "of a write", unit="bytes", inert=DIRECT_WRITER, low=0)
    io_buffer_double: bool = key(True, "two buffers", inert=DIRECT_WRITER)
    io_multiplier: int = key(1, "writers of a rank", inert=DIRECT_WRITER, low=0)
    data_parallel: Literal["REPLICA", "SOCKET", "MACHINE"] | None = key(
        None, "which ranks write", inert="every rank always writes its part"
    )
    show_statistics: bool = key(False, "print its speed", inert="the log has seconds and stall of every save")


@dataclass(frozen=True)
class Checkpoint:
    """How checkpoints are written, checked and kept. Keys that DeepSpeed does not have say so."""

    tag_validation: Literal["Ignore", "Warn", "Fail"] = key(
        "Warn", "when ranks save under different tags: nothing is said, a warning, or an error"
    )
    load_universal: bool = key(
        False, "read DeepSpeed's universal format; what a folder holds is recognised without it, too"
    )
    use_node_local_storage: bool = key(
        False,
        "write on each node",
        refuse=unless(False, use="ranks commit a checkpoint together: set it to false, and save where all can write"),
    )
    parallel_write: dict[str, Any] = key({}, "of pipeline stages", inert="every rank always writes its part")
    checkpoint_serialization: bool = key(True, "pickle format", inert="nothing is pickled")
    writer: CheckpointWriter = block(CheckpointWriter, "DeepSpeed's FastPersist")
    async_save: bool = key(
        False, "tritonspeed's own: write while training goes on, which waits for the copy to host memory only"
    )
    keep_last: int | None = key(
        None, "tritonspeed's own: newest checkpoints that stay when one is saved; null deletes none", low=1
    )
    verify: Literal["full", "sampled", "none"] = key(
        "full", "tritonspeed's own: which digests are compared when one is loaded"
    )
    save_model: bool = key(
        False, "tritonspeed's own: write model/ too, which from_pretrained reads, in the computing type"
    )
    save_on_sigterm: bool = key(
        False, "tritonspeed's own: on SIGTERM finish the step, save on all ranks, and exit with exit_code"
    )
    save_dir: str | None = key(
        None,
        "tritonspeed's own: where save_on_sigterm saves; null is where a checkpoint was last saved or loaded",
        inert=_with_sigterm,
    )
    exit_code: int = key(
        143, "tritonspeed's own: 143 is 128 + SIGTERM, which schedulers expect", inert=_with_sigterm, low=0, high=255
    )

    @property
    def saves_in_background(self) -> bool:
        """Whether training goes on while a checkpoint is written."""
        return self.async_save or self.writer.decoupled


@dataclass(frozen=True)
class ProgressiveLayerDrop:
    """Stochastic depth."""

    enabled: bool = key(
        False, "drop layers at random", refuse=unless(False, use="not built; set it to false, and drop in the model")
    )
    theta: float = key(1.0, "final keep rate", inert="acts only with progressive_layer_drop.enabled")
    gamma: float = key(0.001, "its decay", inert="acts only with progressive_layer_drop.enabled")


FEATURE_GATES = {
    "amp": switched_on("Apex AMP is not supported; use bf16 or fp16"),
    "expert_parallel": switched_on("expert parallelism is not built; set enabled to false (ZeRO-3 shards experts)"),
    "autotuning": switched_on("not built; set enabled to false, and use the estimate to choose stage and batch"),
    "data_efficiency": switched_on("changes which samples are seen and is not built; set enabled to false"),
    "curriculum_learning": switched_on("changes which samples are seen and is not built; set enabled to false"),
    "compression_training": switched_on("changes the model and is not built; set every enabled to false"),
    "eigenvalue": switched_on("belongs to quantize_training, which is not built; set enabled to false"),
    "quantize_training": switched_on("not built; set enabled to false, and compute in bf16"),
    "nebula": switched_on("a checkpoint service that is not supported; set enabled to false"),
}
"""Blocks whose contents are not checked, by what turns them on."""
