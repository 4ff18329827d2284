"""Checkpoints by real DeepSpeed, and beside each what must be read from it: the truth for our reader.

    VENV/bin/python -m bench.peers.deepspeed_checkpoints --out FOLDER [--only NAME ...]
    VENV/bin/python -m bench.peers.deepspeed_checkpoints --out FOLDER --pack ARCHIVE             what CI reads
    VENV/bin/python -m bench.peers.deepspeed_checkpoints --out JSON --only NAME --resume FOLDER  from a universal one

VENV is bench/peers/setup.sh's. Every case is gloo ranks of its own: three steps of a tiny model, save, three steps
more. Beside FOLDER/NAME/checkpoint stand truth.pt (masters and states of the optimizer by parameter, as DeepSpeed's
own accessors give them; the frozen parameter and the buffer; the batches) and truth.json (losses before and after,
scheduler, config). A case whose name ends in "-universal" is another case's checkpoint after ds_to_universal.

fp16: DeepSpeed refuses it on most CPUs, though torch computes it. Those cases run with that one answer overridden; all
else is DeepSpeed's own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STEPS, VOCABULARY, WIDTH, LENGTH, BATCH = 3, 29, 12, 7, 2
LIMIT_S = 240
STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum")


class Block(nn.Module):
    """Two linears around a non-linearity, beside the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """Two blocks; head tied to the embedding; frozen positions; a parameter of 5 elements; a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(5))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy of the next token, fp32; tokens (batch, length + 1)."""
        x = self.embedding(tokens[:, :-1]) + self.positions
        x = x * self.scale.to(x.dtype)
        x = torch.cat([x[..., :5] * self.gain, x[..., 5:]], dim=-1)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def batches(world: int) -> Tensor:
    """(2 · steps, ranks, batch, length + 1), int64."""
    source = torch.Generator().manual_seed(11)
    return torch.randint(0, VOCABULARY, (2 * STEPS, world, BATCH, LENGTH + 1), generator=source)


@dataclass(frozen=True)
class Case:
    """A config; ``zero`` and ``extra`` are laid over the common one."""

    stage: int
    precision: str
    zero: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "AdamW"
    of_optimizer: dict[str, Any] = field(default_factory=dict)
    single_group: bool = False
    world: int = 2

    def config(self) -> dict[str, Any]:
        """What deepspeed.initialize is given."""
        zero: dict[str, Any] = {"stage": self.stage, **self.zero}
        if self.stage == 3:
            # nothing stays whole, and sub-groups are small enough that there are several
            zero = {"stage3_param_persistence_threshold": 0, "sub_group_size": 300, **zero}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**6,
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-2, **self.of_optimizer}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 10}},
            "zero_optimization": zero,
        }
        if self.precision != "fp32":
            config[self.precision] = {"enabled": True}
        if self.precision == "fp16":
            config["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 2}
        for key, value in self.extra.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        return config


HOST = {"offload_optimizer": {"device": "cpu"}}
CASES: dict[str, Case] = {
    f"stage{stage}-{precision}": Case(stage, precision) for precision in ("fp32", "bf16", "fp16") for stage in range(4)
}
CASES |= {f"stage{stage}-bf16-host": Case(stage, "bf16", HOST) for stage in (1, 2, 3)}
CASES |= {
    "stage0-fp32-single": Case(0, "fp32", single_group=True),
    "stage0-bf16-single": Case(0, "bf16", single_group=True),
    "stage1-bf16-fp32accum": Case(1, "bf16", extra={"data_types": {"grad_accum_dtype": "fp32"}}),
    "stage1-bf16-immediate": Case(
        1, "bf16", extra={"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"immediate_grad_update": True}}
    ),
    "stage2-bf16-robin": Case(2, "bf16", {"round_robin_gradients": True}),
    "stage2-bf16-aligned": Case(2, "bf16", {"parameter_alignment": True}),
    "stage2-fp32-elastic": Case(2, "fp32", {"elastic_checkpoint": True}),
    "stage2-fp32-torch": Case(2, "fp32", of_optimizer={"torch_adam": True}),
    "stage3-fp32-torch": Case(3, "fp32", of_optimizer={"torch_adam": True}),
    "stage2-fp32-three": Case(2, "fp32", world=3),
    "stage3-bf16-four": Case(3, "bf16", world=4),  # the last rank has nothing of the parameter of 5 elements
    "stage2-fp32-sgd": Case(
        2, "fp32", optimizer="SGD", of_optimizer={"momentum": 0.9}, extra={"zero_allow_untested_optimizer": True}
    ),
    "stage2-fp32-adagrad": Case(2, "fp32", HOST, optimizer="Adagrad"),  # without HOST it fails at its first step
    "stage1-fp32-lion": Case(1, "fp32", HOST, optimizer="Lion"),  # the other Lion is CUDA's
}
# what CI reads, without DeepSpeed
PACKED = (
    *("stage0-fp32", "stage0-bf16", "stage1-bf16", "stage1-bf16-fp32accum", "stage2-fp16", "stage2-fp32-three"),
    *("stage2-bf16-robin", "stage2-bf16-aligned", "stage2-fp32-elastic", "stage3-fp16", "stage3-bf16-four"),
    *(
        "stage1-fp32-lion",
        "stage2-fp32-sgd",
        "stage2-fp32-adagrad",
        "stage3-bf16",
        "stage3-bf16-universal",
        "stage2-fp16-universal",
    ),
)
UNIVERSAL = ("stage1-bf16", "stage2-fp32", "stage3-bf16", "stage2-fp16", "stage1-bf16-fp32accum")


def train(case: Case, out: Path) -> None:
    """One rank's run."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if case.precision == "fp16":
        get_accelerator().is_fp16_supported = lambda: True
    model = Tiny()
    parameters: Any = [p for p in model.parameters() if p.requires_grad] if case.single_group else groups(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=case.config())
    rank, tokens = torch.distributed.get_rank(), batches(case.world)

    before = _losses(engine, tokens, 0)
    kept = truth(engine)
    scheduler = engine.lr_scheduler.state_dict()
    scale = None
    if case.precision == "fp16":
        held = getattr(engine.optimizer, "loss_scale_config", engine.optimizer)
        scale = held.cur_scale
    engine.save_checkpoint(str(out / "checkpoint"), client_state={"epoch": 4, "note": "seen"})
    after = _losses(engine, tokens, STEPS)
    if rank == 0:
        torch.save({**kept, "batches": tokens}, out / "truth.pt")
        facts = {"before": before, "after": after, "scheduler": scheduler, "scale": scale, "config": case.config()}
        (out / "truth.json").write_text(json.dumps(facts, indent=1))
    engine.destroy()


def resume(case: Case, folder: Path, out: Path) -> None:
    """One rank's run that loads a universal checkpoint and takes three steps; ``out`` is a file for the losses."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if case.precision == "fp16":
        get_accelerator().is_fp16_supported = lambda: True
    model = Tiny()
    config = {**case.config(), "checkpoint": {"load_universal": True}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups(model), config=config)
    path, client_state = engine.load_checkpoint(str(folder))
    tokens, rank = batches(case.world), torch.distributed.get_rank()
    first, losses = engine.global_steps, _losses(engine, tokens, engine.global_steps)
    if rank == 0:
        found = {"path": path, "epoch": client_state.get("epoch"), "first": first, "losses": losses}
        out.write_text(json.dumps(found))
    engine.destroy()


def _losses(engine: Any, tokens: Tensor, first: int) -> list[float]:
    """Of ``STEPS`` steps, mean over the ranks."""
    losses, world = [], tokens.shape[1]
    for step in range(first, first + STEPS):
        loss = engine(tokens[step, torch.distributed.get_rank()])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def truth(engine: Any) -> dict[str, Tensor]:
    """{"master|name": ..., "exp_avg|name": ..., "parameters|name": frozen, "buffer|name": ...}, whole, on all ranks."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, Tensor] = {}
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # 0.19.8 links states after the first group's first step: the other groups' accessors would raise
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    states = [s for s in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values() if s]
    kinds = [k for k in STATES if states and k in states[0]]  # asked of what a rank lacks, it would not take part
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[f"parameters|{name}"] = parameter.detach().clone()
        elif engine.zero_optimization_stage() or hasattr(parameter, "_hp_mapping"):
            found[f"master|{name}"] = safe_get_full_fp32_param(parameter)
            for kind in kinds:
                found[f"{kind}|{name}"] = safe_get_full_optimizer_state(parameter, kind)
        else:
            found |= _unsharded(engine, name, parameter)
    found |= {f"buffer|{name}": buffer.clone() for name, buffer in engine.module.named_buffers()}
    return {key: value.detach().cpu().contiguous().clone() for key, value in found.items()}


def _unsharded(engine: Any, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The same where nothing is sharded: torch's own optimizer, or DeepSpeed's over flat or separate masters."""
    optimizer = engine.optimizer
    low = getattr(optimizer, "fp16_groups", None)
    if low is None:
        state = optimizer.state[parameter]
        return {f"master|{name}": parameter} | {f"{k}|{name}": v for k, v in state.items() if k in STATES}
    for i, group in enumerate(low):
        offset = 0
        for j, each in enumerate(group):
            if each is parameter and hasattr(optimizer, "fp32_groups"):
                master = optimizer.fp32_groups[i][j]
                state = optimizer.optimizer.state[master]
                return {f"master|{name}": master} | {f"{k}|{name}": v for k, v in state.items() if k in STATES}
            if each is parameter:
                flat = optimizer.fp32_groups_flat[i]
                state = optimizer.optimizer.state[flat]
                values = {"master": flat, **{k: v for k, v in state.items() if k in STATES}}
                cut = slice(offset, offset + each.numel())
                return {f"{k}|{name}": v.flatten()[cut].view(each.shape) for k, v in values.items()}
            offset += each.numel()
    raise AssertionError(f"{name} is in no group of the optimizer")


def launch(name: str, out: Path, *more: str) -> None:
    """One case in ranks of its own, ended after ``LIMIT_S`` seconds; ``out`` is what they must write."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(CASES[name].world),
    ]
    command += ["-m", "bench.peers.deepspeed_checkpoints", "--rank-of", name, *more]
    tools = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    # gloo ranks now and then abort at exit, after the last thing is written
    if not out.is_file():
        raise RuntimeError(f"{name}: {output[-3000:]}")


def make(name: str, out: Path) -> None:
    """One case: checkpoint and truth."""
    out.mkdir(parents=True)
    launch(name, out / "truth.json", "--out", str(out))


def convert(source: Path, out: Path) -> None:
    """DeepSpeed's own conversion to its universal format; the truth stays the source's."""
    out.mkdir(parents=True)
    tag = (source / "checkpoint/latest").read_text().strip()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(source / "checkpoint" / tag)]
    command += ["--output_folder", str(out / "checkpoint" / f"{tag}_universal")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{out.name}: {done.stdout[-1000:]} {done.stderr[-3000:]}")
    for file in ("truth.json", "truth.pt"):
        (out / file).write_bytes((source / file).read_bytes())


def pack(made: Path, file: Path) -> None:
    """The cases that CI reads, in one archive that says nothing of who made it, or where."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return None if member.name.endswith(".py") else member

    with tarfile.open(file, "w:xz", preset=9) as archive:
        for name in PACKED:
            archive.add(made / name, name, filter=plain)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", nargs="*", help="names of cases; all without it")
    p.add_argument("--pack", type=Path, help="put what tests read from --out into this .tar.xz, and make nothing")
    p.add_argument("--resume", type=Path, help="instead: load this folder's universal checkpoint, as the one --only")
    p.add_argument("--rank-of", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.rank_of and a.resume:
        resume(CASES[a.rank_of], a.resume, a.out)
    elif a.rank_of:
        train(CASES[a.rank_of], a.out)
    elif a.resume:
        launch(a.only[0], a.out, "--out", str(a.out), "--resume", str(a.resume))
    elif a.pack:
        pack(a.out, a.pack)
    else:
        make_all(a.only, a.out)


def make_all(only: list[str] | None, out: Path) -> None:
    """Every case that is not there yet."""
    names = only or [*CASES, *(f"{name}-universal" for name in UNIVERSAL)]
    for name in names:
        source = name.removesuffix("-universal")
        try:
            for each in (source, name):
                if (out / each / "truth.json").is_file():
                    continue
                make(each, out / each) if each == source else convert(out / source, out / name)
            print(f"{name}: made", flush=True)
        except RuntimeError as error:
            print(f"{name}: FAILED\n{error}", flush=True)


if __name__ == "__main__":
    main()
