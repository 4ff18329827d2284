"""Four models in one Accelerate program: a student and a critic that are trained in turn, a teacher and a reference
that are not; each under a DeepSpeedPlugin of its own, one by deepspeed.initialize itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import set_seed
from tiny import arguments, record, tiny_llama, token_samples
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

STEPS, BATCH = 4, 2


class Critic(nn.Module):
    """Hidden states to one number each; its first layer is large enough to be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(32, 64), nn.Linear(64, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, length, 32) → (batch, length)."""
        return self.out(torch.tanh(self.inner(states))).squeeze(-1)


def at_stage(path: str, stage: int) -> dict[str, Any]:
    """The config of the run, at another stage; what Accelerate would look up elsewhere in figures."""
    config = json.loads(Path(path).read_text())
    sizes = {"reduce_bucket_size": 1024, "stage3_prefetch_bucket_size": 900, "stage3_param_persistence_threshold": 320}
    config["zero_optimization"].update(sizes, stage=stage)
    return {**config, "train_micro_batch_size_per_gpu": BATCH}


def reference_of(model: nn.Module, config: dict[str, Any], hidden: int) -> nn.Module:
    """As TRL prepares a reference model: no optimizer, dotted keys that mean nothing, a stage of 0 or 3."""
    kept = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
    kept.update(
        {
            "zero_optimization.reduce_bucket_size": hidden * hidden,
            "zero_optimization.stage3_param_persistence_threshold": 10 * hidden,
            "zero_optimization.stage3_prefetch_bucket_size": 0.9 * hidden * hidden,
        }
    )
    engine, *_ = deepspeed.initialize(model=model, config=kept)
    engine.eval()
    return engine


class Run:
    """The four models, and what is done with them."""

    def __init__(self, args: Any) -> None:
        stages = {"student": args.student, "teacher": args.teacher, "critic": args.critic}
        plugins = {name: DeepSpeedPlugin(hf_ds_config=at_stage(args.deepspeed, n)) for name, n in stages.items()}
        self.accelerator = Accelerator(deepspeed_plugins=plugins)
        self.second = Accelerator()
        set_seed(0)
        student, teacher, critic, reference = tiny_llama(), tiny_llama(num_hidden_layers=3), Critic(), tiny_llama()
        data = DataLoader(token_samples(2 * BATCH * STEPS), batch_size=BATCH)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        self.student, self.student_optimizer, self.data = self.accelerator.prepare(student, optimizer, data)
        self.accelerator.state.select_deepspeed_plugin("teacher")
        self.teacher = self.accelerator.prepare(teacher)
        self.teacher.eval()
        config = plugins["teacher"].deepspeed_config
        self.reference = reference_of(reference, config, 32)
        self.accelerator.state.select_deepspeed_plugin("critic")
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        self.critic, self.critic_optimizer = self.second.prepare(critic, optimizer)

    def step(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """The student towards the teacher; then the critic, on what the student says now."""
        with torch.no_grad():
            soft = functional.log_softmax(self.teacher(**batch).logits, -1)
            kept = functional.log_softmax(self.reference(**batch).logits, -1)
        out = self.student(**batch)
        own = functional.log_softmax(out.logits, -1)
        apart = functional.kl_div(own, soft, log_target=True, reduction="batchmean") / 16
        far = functional.kl_div(own, kept, log_target=True, reduction="batchmean") / 16
        loss = out.loss + apart + 0.1 * far
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), 1.0)
        self.student_optimizer.step()
        self.student_optimizer.zero_grad()
        with torch.no_grad():
            states = self.student(**batch, output_hidden_states=True).hidden_states[-1]
        wrong = (self.critic(states) - batch["input_ids"] / 64).pow(2).mean()
        self.second.backward(wrong)
        row = {"critic_norm": self.second.clip_grad_norm_(self.critic.parameters(), 1.0), "student_norm": norm}
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        row = {name: float(value) for name, value in row.items() if value is not None}
        means = self.accelerator.reduce(torch.stack([loss, apart, far, wrong]).detach(), "mean").tolist()
        return {**dict(zip(("loss", "apart", "far", "critic"), means, strict=True)), **row}

    def save(self, out: str, all_of_it: bool) -> None:
        """What is trained; or all that is prepared: real DeepSpeed fails to save an engine without an optimizer."""
        if all_of_it:
            self.accelerator.save_state(f"{out}/first")
        else:
            self.student.save_checkpoint(f"{out}/first")
        self.second.save_state(f"{out}/second")

    def load(self, out: str, all_of_it: bool) -> None:
        """The same again."""
        if all_of_it:
            self.accelerator.load_state(f"{out}/first")
        else:
            self.student.load_checkpoint(f"{out}/first")
        self.second.load_state(f"{out}/second")


def main() -> None:
    """Two steps, a save, two more; those two again after a load."""
    args = arguments(student=2, teacher=3, critic=1, cpu=False, save_all=False).parse_args()
    if args.cpu:  # real DeepSpeed on a CPU needs to be told so before Accelerator looks for GPUs
        PartialState(cpu=True)
    run = Run(args)
    batches = list(run.data)
    assert len(batches) == STEPS, len(batches)
    rows = [run.step(batch) for batch in batches[:2]]
    run.save(args.out, args.save_all)
    after = [run.step(batch) for batch in batches[2:]]
    run.load(args.out, args.save_all)
    again = [run.step(batch) for batch in batches[2:]]
    assert again == after, f"after load_state:\n{again}\nbefore:\n{after}"
    if run.accelerator.is_main_process:
        record(args.out, rows + after)


if __name__ == "__main__":
    main()
