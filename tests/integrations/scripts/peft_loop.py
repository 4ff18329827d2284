"""Adapters in a loop on DeepSpeed itself: AdaLoRA, which asks for gradients between backward and step; prompts; and a
checkpoint without what is frozen, loaded into another engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import AdaLoraConfig, PromptTuningConfig, get_peft_model
from tiny import arguments, record, tiny_llama, token_samples
from transformers import set_seed
from transformers.integrations import HfDeepSpeedConfig

STEPS, BATCH = 4, 2


def adapter(method: str) -> Any:
    """AdaLoRA that scores but masks nothing yet (what it masks, real DeepSpeed's step brings back); or prompts."""
    if method == "prompt":
        return PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    ranks = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 0, "deltaT": 100, "total_step": STEPS + 1}
    targets = ["q_proj", "v_proj", "down_proj"]
    return AdaLoraConfig(lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM", **ranks)


def engine_of(method: str, config: dict[str, Any], seed: int) -> Any:
    """The base is the same for all seeds, the adapter is not; only the adapter is in the optimizer."""
    set_seed(0)
    base = tiny_llama()
    set_seed(seed)
    model = get_peft_model(base, adapter(method))
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    return engine


def batches(rank: int) -> list[dict[str, torch.Tensor]]:
    """This rank's, in turn."""
    samples = token_samples(2 * BATCH * STEPS)
    own = [samples[i : i + BATCH] for i in range(rank * BATCH, len(samples), 2 * BATCH)]
    return [{key: torch.stack([s[key] for s in each]) for key in each[0]} for each in own]


def train(engine: Any, data: list[dict[str, torch.Tensor]], first: int) -> list[dict[str, float]]:
    """A row per step: with the sum of all gradients, looked at before they are gone."""
    rows = []
    for number, batch in enumerate(data, first):
        loss = engine(**batch).loss
        engine.backward(loss)
        whole = [deepspeed.utils.safe_get_full_grad(p) for p in engine.module.parameters() if p.requires_grad]
        gradient = sum(float(g.abs().sum()) for g in whole)
        tuner = engine.module.base_model
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(number)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        rows.append({"loss": mean.item() / 2, "gradient": gradient, "grad_norm": float(engine.get_global_grad_norm())})
        if hasattr(tuner, "rankallocator"):
            scores = tuner.rankallocator.exp_avg_ipt
            rows[-1]["importance"] = sum(float(score.abs().sum()) for score in scores.values())
    return rows


def main() -> None:
    """Two steps, a checkpoint of the adapter alone, two more; the same two in an engine that loads it."""
    args = arguments(method="adalora").parse_args()
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    config = json.loads(Path(args.deepspeed).read_text())
    kept = HfDeepSpeedConfig(config)  # how PEFT knows that gradients are DeepSpeed's
    engine = engine_of(args.method, kept.config, 1)
    rows = train(engine, batches(rank)[:2], 1)
    engine.save_checkpoint(args.out, tag="two", exclude_frozen_parameters=True)
    size = sum(f.stat().st_size for f in Path(args.out, "two").rglob("*") if f.is_file())
    again = engine_of(args.method, kept.config, 2)
    path, _ = again.load_checkpoint(args.out, tag="two", load_module_strict=False)
    assert path, "nothing was loaded"
    if hasattr(engine.module.base_model, "rankallocator"):  # PEFT's own state, which no checkpoint has
        again.module.base_model.rankallocator = engine.module.base_model.rankallocator
    rows += train(again, batches(rank)[2:], 3)
    if rank == 0:
        total = sum(p.numel() for p in engine.module.parameters())
        record(args.out, rows, trainable_parameters=engine.module.get_nb_trainable_parameters()[0])
        print(f"checkpoint of the adapter: {size} bytes, {total} parameters", flush=True)


if __name__ == "__main__":
    main()
