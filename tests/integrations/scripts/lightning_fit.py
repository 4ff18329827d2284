"""Lightning's Trainer with DeepSpeedStrategy: fit, validate, test, checkpoint, resume, one fp32 file of it.

With ``--ddp`` the same training under Lightning's own DDP: what the numbers are to be.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from plain_gpt import PlainGPT, token_loss, token_rows
from tiny import arguments, record
from torch.utils.data import DataLoader, TensorDataset

parser = arguments(package="lightning.pytorch", ddp=False, steps=4, precision="32")
args = parser.parse_args()
pl = import_module(args.package)


class Module(pl.LightningModule):
    """Built by the strategy, sharded as it is made; or at once, whole."""

    def __init__(self, lr: float = 3e-3, seed: int = 0, build: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = None
        self.seen: list[dict[str, float]] = []
        if build:
            self.configure_model()

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(self.hparams.seed)
            self.model = PlainGPT()

    def training_step(self, batch: Any, index: int) -> Any:
        loss = token_loss(self.model(batch[0]), batch[0])
        self.seen.append({"loss": loss.item(), "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"]})
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", token_loss(self.model(batch[0]), batch[0]), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", token_loss(self.model(batch[0]), batch[0]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if not hasattr(pl.LightningModule, "configure_model"):  # its name before Lightning 2
    Module.configure_sharded_model = Module.configure_model


def loader(seed: int, count: int) -> DataLoader:
    return DataLoader(TensorDataset(token_rows(count, seed=seed)), batch_size=2, shuffle=False)


def strategy(**more: Any) -> Any:
    """DeepSpeed's, which asks for GPUs: this machine need not have any."""
    if args.ddp:
        return "ddp"
    module = import_module(f"{args.package}.strategies.deepspeed")
    module.CUDAAccelerator = import_module(f"{args.package}.accelerators").CPUAccelerator
    module._validate_device_index_selection = lambda devices: None
    return pl.strategies.DeepSpeedStrategy(config=json.loads(Path(args.deepspeed).read_text()), **more)


def trainer(max_steps: int, **more: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy(**more),
        precision=args.precision,
        max_steps=max_steps,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        default_root_dir=args.out,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **quiet,
    )


train, valid, test = loader(1, 64), loader(2, 8), loader(3, 8)
half, whole, file = (str(Path(args.out) / name) for name in ("half.ckpt", "whole.ckpt", "whole.pt"))
before, module = Module(build=args.ddp), Module(seed=1, build=args.ddp)  # other weights, until the checkpoint is loaded
first = trainer(args.steps // 2)
first.fit(before, train)
first.save_checkpoint(half)
resumed = trainer(args.steps)
resumed.fit(module, train, valid, ckpt_path=half)
metrics = {"val_loss": resumed.validate(module, valid, verbose=False)[0]["val_loss"]}
metrics["test_loss"] = resumed.test(module, test, verbose=False)[0]["test_loss"]
metrics["global_step"] = resumed.global_step

if not args.ddp:
    resumed.save_checkpoint(whole)
    if resumed.global_rank == 0:
        convert = import_module(f"{args.package}.utilities.deepspeed").convert_zero_checkpoint_to_fp32_state_dict
        client_state = convert(whole, file) or torch.load(file, weights_only=False)  # Lightning 1 returns nothing
        metrics["converted"] = sorted(client_state["state_dict"]) == sorted(module.state_dict())
        metrics["global_step_kept"] = client_state["global_step"]
    resumed.strategy.barrier()
    loaded = Module.load_from_checkpoint(file, map_location="cpu", strict=True, seed=2, build=True)
    metrics["loaded_lr"] = loaded.hparams.lr
    again = trainer(args.steps, load_full_weights=True)
    full = {"ckpt_path": file} if again.strategy.zero_stage_3 else {}  # Lightning reads one file at stage 3 alone
    model = Module(seed=1) if full else loaded
    metrics["test_loss_converted"] = again.test(model, test, verbose=False, **full)[0]["test_loss"]
if resumed.global_rank == 0:
    record(args.out, before.seen + module.seen, **metrics)
