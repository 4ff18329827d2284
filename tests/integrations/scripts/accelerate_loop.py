"""A loop of one's own on Accelerate: two epochs of uneven data, accumulated; saved and resumed, evaluated, exported.

Without --deepspeed the config comes from `accelerate launch --use_deepspeed`, by the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState, load_checkpoint_in_model
from accelerate.utils import DummyOptim, DummyScheduler, set_seed
from safetensors.torch import load_file
from tiny import arguments, record, tiny_llama, token_samples
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, get_linear_schedule_with_warmup

EPOCHS, SAMPLES, BATCH, ACCUMULATION = 2, 22, 2, 2  # six micro-batches of a rank in an epoch, the last one short
CLOSE = 2e-2  # logits of 16-bit weights, computed in fp32; in fp32 they are equal to 1e-5


class Counter:
    """An object of the user's, saved with the state."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def optimizer_and_schedule(kind: str, model: torch.nn.Module, lr: float) -> tuple[Any, Any]:
    """torch's own; those of the config; or the config's optimizer under a schedule of one's own."""
    if kind == "torch":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        return optimizer, get_linear_schedule_with_warmup(optimizer, 2, 40)
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = DummyOptim(groups, lr=lr)
    if kind == "config":
        return optimizer, DummyScheduler(optimizer, total_num_steps=24, warmup_num_steps=2)
    return optimizer, DummyScheduler(
        optimizer, lr_scheduler_callable=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5)
    )


class Run:
    """What a run is made of, and its parts."""

    def __init__(self, args: Any) -> None:
        plugin = DeepSpeedPlugin(hf_ds_config=args.deepspeed) if args.deepspeed else None
        self.out = Path(args.out)
        self.accelerator = Accelerator(
            deepspeed_plugin=plugin, gradient_accumulation_steps=ACCUMULATION, mixed_precision=args.mixed_precision
        )
        assert self.accelerator.num_processes == 2, f"{self.accelerator.num_processes} processes"
        set_seed(0)
        model = tiny_llama()
        if args.pretrained:  # under zero3_init_flag each rank makes, and fills, its own part
            if self.accelerator.is_main_process:
                model.save_pretrained(self.out / "pretrained")
            self.accelerator.wait_for_everyone()
            model = LlamaForCausalLM.from_pretrained(self.out / "pretrained")
        train = DataLoader(token_samples(SAMPLES), batch_size=BATCH)
        evaluate = DataLoader(token_samples(7, seed=2), batch_size=BATCH)
        optimizer, schedule = optimizer_and_schedule(args.optimizer, model, args.lr)
        prepared = self.accelerator.prepare(model, optimizer, train, evaluate, schedule)
        self.model, self.optimizer, self.train_data, self.evaluate_data, self.schedule = prepared
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def epoch(self) -> list[dict[str, float]]:
        """One row per update."""
        rows, losses, norm = [], [], None
        self.model.train()
        for batch in self.train_data:
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                losses.append(self.accelerator.reduce(loss.detach().float(), "mean").item())
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                row = {"loss": sum(losses) / len(losses), "learning_rate": self.schedule.get_last_lr()[0]}
                row["skipped"] = float(self.optimizer.step_was_skipped)
                rows.append(row if norm is None else {**row, "grad_norm": float(norm)})
                losses.clear()
                self.counter.seen += 1
        return rows

    def evaluate(self) -> dict[str, float]:
        """Over data that no two ranks share evenly: each sample counts once."""
        self.model.eval()
        losses, right = [], []
        for batch in self.evaluate_data:
            with torch.no_grad():
                logits = self.model(**batch).logits
            each = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten()
            )
            losses.append(self.accelerator.gather_for_metrics(each.repeat(len(logits))))
            right.append(self.accelerator.gather_for_metrics(logits.argmax(-1)))
        seen = torch.cat(right)
        assert len(seen) == 7, f"{len(seen)} of 7 samples"
        metrics = {"eval_loss": torch.cat(losses).mean().item()}
        if logits.dtype == torch.float32:  # in 16 bits two tokens are often equally likely
            metrics["predicted"] = float(seen.float().mean())
        return metrics

    def resumes_exactly(self) -> list[dict[str, float]]:
        """An epoch after save_state; the same epoch again after load_state, to the bit."""
        self.accelerator.save_state(str(self.out / "state"))
        rows = self.epoch()
        self.accelerator.load_state(str(self.out / "state"))
        assert self.counter.seen == 3, f"the counter was saved at 3 and is loaded at {self.counter.seen}"
        again = self.epoch()
        assert again == rows, f"after load_state:\n{again}\nbefore:\n{rows}"
        return rows

    def exports(self) -> dict[str, float]:
        """The weights, out by each way that Accelerate has; a model made of them answers like this one."""
        accelerator, plain = self.accelerator, self.accelerator.unwrap_model(self.model)
        assert type(plain) is LlamaForCausalLM, f"unwrap_model() gave {type(plain)}"
        prompt = {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        self.model.eval()
        with torch.no_grad():
            expected = self.model(**prompt).logits
            tokens = plain.generate(**prompt, max_new_tokens=6, do_sample=False)
        state = accelerator.get_state_dict(self.model)
        weights = {"sum_of_weights": sum(float(v.double().abs().sum()) for v in (state or {}).values())}
        plain.save_pretrained(
            self.out / "saved",
            is_main_process=accelerator.is_main_process,
            state_dict=state,
            save_function=accelerator.save,
        )
        accelerator.save_model(self.model, str(self.out / "model"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            saved, other = tiny_llama().eval(), tiny_llama().eval()
            saved.load_state_dict(load_file(self.out / "saved" / "model.safetensors"))
            load_checkpoint_in_model(other, str(self.out / "model"))
            for made in (saved, other):
                torch.testing.assert_close(made(**prompt).logits, expected.float(), rtol=CLOSE, atol=CLOSE)
        accelerator.wait_for_everyone()
        return {"last_token": float(tokens[0, -1]), **weights}


def main() -> None:
    """The whole run."""
    parser = arguments(optimizer="torch", pretrained=False, cpu=False, mixed_precision="no", lr=1e-2)
    args = parser.parse_args()
    if args.cpu:  # real DeepSpeed on a CPU needs to be told so before Accelerator looks for GPUs
        PartialState(cpu=True)
    run = Run(args)
    rows = run.epoch()
    metrics = run.evaluate()
    rows += run.resumes_exactly()
    metrics |= run.exports()
    (run.model, run.optimizer) = run.accelerator.free_memory(run.model, run.optimizer)
    if run.accelerator.is_main_process:
        record(args.out, rows, **metrics)
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
