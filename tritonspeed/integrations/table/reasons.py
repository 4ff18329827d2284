"""Why a name is not provided, and what to do instead: said once, for names and for whole modules."""

from __future__ import annotations

PIPELINE = "pipeline parallelism is not built: ZeRO stage 3 with offload fits the same models; or use real DeepSpeed"
ONE_BIT = "1-bit optimizers are not built: use AdamW or LAMB; reduce in bf16 with communication_data_type"
MICS = "MiCS is not built: use zero.Init and stage 3 over all ranks"
INFERENCE = "the inference engine is not built yet: under stage 3, model.generate() works on the model itself"
HYBRID = "a hybrid engine is not needed: model.generate() works on the model itself, between steps, at every stage"
MOE = "expert parallelism is not built: Hugging Face's mixture-of-experts models train at every stage as they are"
SEQUENCE = "sequence parallelism is not built: leave sp_size at 1; checkpointing and offload make long sequences fit"
TENSOR_PARALLEL = "tensor parallelism is not built yet: stage 3 shards parameters over all ranks"
TILED = "tiled linears are not built: stage 3 with offload_param holds one block at a time"
KERNELS = "kernels come by structure, not by replacement layers: tritonspeed.kernels.patch(model)"
ZENFLOW = "ZenFlow is not built: offload_optimizer, whose update runs under the next forward at stage 3"
SUPEROFFLOAD = "SuperOffload is not built: offload_optimizer, whose update runs under the next forward at stage 3"
DATA = "data efficiency and curricula are not built: order the samples in your Dataset or Sampler"
LOADER = "pass training_data to initialize(), or use torch's DataLoader with a DistributedSampler"
CONFIG = "tritonspeed.config.load(config).resolve(world_size) reads a ds_config.json and holds its keys"
METRICS = "the tensorboard, csv_monitor and wandb blocks of the config write a run's metrics"
TIMERS = "engine.last_step holds a step's facts; wall_clock_breakdown in the config asks for its times"
PROFILER = "the config's flops_profiler block profiles a step; engine.achieved() sets it beside the machine's speeds"
COMMS_LOG = 'the "comms_logger" block of the config asks for the log of what ranks send each other'
BACKENDS = "the backend is torch.distributed's own: gloo or nccl, by init_distributed(dist_backend=...)"
CHECKPOINTS = (
    "checkpoints load at any number of ranks as they are; `tritonspeed convert` makes and reads universal ones"
)
LORA = "use PEFT's LoRA: its adapters train under every stage, and frozen weights have no masters and no moments"
AUTOTUNING = "`tritonspeed estimate` computes which settings fit, without running anything"
COMPRESSION = "compression is not built: quantise or prune what save_16bit_model() wrote with a tool made for it"
ELASTICITY = "--num_nodes MIN:MAX starts with the nodes that arrive, and a checkpoint goes on with another number"
OPS = "no op is compiled: kernels are Triton and PyTorch, and `tritonspeed report` says which work here"
DISK = "offload to disk is built in: offload_optimizer and offload_param with device nvme"
CHUNKED_HEAD = "tritonspeed.kernels.linear_cross_entropy is a head and its loss that never hold all logits"
COMPILE = "torch.compile with ZeRO's collectives inside the graph is not built: engine.compile() compiles the modules"
INNER = "a part of DeepSpeed's engine without a counterpart here: the engine and its optimizer do that work inside"
KEYS = "constants of DeepSpeed's parser: write a config's keys as text; docs/config-keys.md lists them"
UNKNOWN = "it is not among the names of DeepSpeed that have an answer"

REASONS: dict[str, str] = {
    "deepspeed": UNKNOWN,
    "deepspeed.accelerator": "get_accelerator() answers for the device, torch's GPU or the CPU",
    "deepspeed.autotuning": AUTOTUNING,
    "deepspeed.checkpoint": CHECKPOINTS,
    "deepspeed.comm": BACKENDS,
    "deepspeed.compat": INNER,
    "deepspeed.compile": COMPILE,
    "deepspeed.compression": COMPRESSION,
    "deepspeed.datastates": CHECKPOINTS,
    "deepspeed.elasticity": ELASTICITY,
    "deepspeed.git_version_info_installed": "deepspeed.git_version_info has what there is to say",
    "deepspeed.inference": INFERENCE,
    "deepspeed.io": "saves write files by themselves, in the background too: engine.save_checkpoint()",
    "deepspeed.launcher": "the command `deepspeed`, or `tritonspeed run --dry-run`, does the launcher's work",
    "deepspeed.linear": LORA,
    "deepspeed.model_implementations": INFERENCE,
    "deepspeed.module_inject": TENSOR_PARALLEL,
    "deepspeed.moe": MOE,
    "deepspeed.monitor": METRICS,
    "deepspeed.nvme": DISK,
    "deepspeed.ops": KERNELS,
    "deepspeed.ops.adam": "FusedAdam and DeepSpeedCPUAdam are in deepspeed.ops.adam",
    "deepspeed.ops.aio": DISK,
    "deepspeed.ops.csrc": OPS,
    "deepspeed.ops.gds": DISK,
    "deepspeed.ops.lion": "FusedLion and DeepSpeedCPULion are in deepspeed.ops.lion",
    "deepspeed.ops.op_builder": OPS,
    "deepspeed.pipe": PIPELINE,
    "deepspeed.profiling": PROFILER,
    "deepspeed.runtime": INNER,
    "deepspeed.runtime.activation_checkpointing": "deepspeed.checkpointing has configure() and checkpoint()",
    "deepspeed.runtime.checkpoint_engine": CHECKPOINTS,
    "deepspeed.runtime.comm": BACKENDS,
    "deepspeed.runtime.compiler": COMPILE,
    "deepspeed.runtime.config_utils": CONFIG,
    "deepspeed.runtime.constants": KEYS,
    "deepspeed.runtime.data_pipeline": DATA,
    "deepspeed.runtime.domino": TENSOR_PARALLEL,
    "deepspeed.runtime.fp16.onebit": ONE_BIT,
    "deepspeed.runtime.hybrid_engine_graph": HYBRID,
    "deepspeed.runtime.model_checkpointing": CHECKPOINTS,
    "deepspeed.runtime.pipe": PIPELINE,
    "deepspeed.runtime.precision_config": CONFIG,
    "deepspeed.runtime.rollout": HYBRID,
    "deepspeed.runtime.sequence_parallel": SEQUENCE,
    "deepspeed.runtime.state_dict_factory": CHECKPOINTS,
    "deepspeed.runtime.superoffload": SUPEROFFLOAD,
    "deepspeed.runtime.swap_tensor": DISK,
    "deepspeed.runtime.tensor_parallel": TENSOR_PARALLEL,
    "deepspeed.runtime.zenflow": ZENFLOW,
    "deepspeed.runtime.zero.leaf_module_config": '"leaf_module" in the config\'s zero_optimization says it',
    "deepspeed.runtime.zero.mics": MICS,
    "deepspeed.runtime.zero.muon": "tritonspeed.optim.Muon, or Muon as the config's optimizer",
    "deepspeed.sequence": SEQUENCE,
    "deepspeed.utils": INNER,
    "deepspeed.utils.comms_logging": COMMS_LOG,
    "deepspeed.utils.timer": TIMERS,
}
"""Why what the table has not is not there: by the longest prefix of its name."""
