"""Adapters under the Trainer: trained, saved, resumed, merged; and only they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import arguments, record, steps_of, tiny_llama, token_samples
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

STEPS = 4
CLOSE = 1e-5
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(method: str) -> Any:
    """The adapter's config."""
    if method == "lora":
        return LoraConfig(**LORA, target_modules=TARGETS)
    if method == "head":  # DoRA, whose norms need whole base weights; a layer and an embedding trained beside it
        return LoraConfig(**LORA, target_modules=TARGETS, use_dora=True, modules_to_save=["lm_head", "embed_tokens"])
    raise ValueError(f"--method {method}")


def make(args: Any, settings: TrainingArguments) -> Any:
    """The base model, from its config or (under zero.Init at stage 3) from a folder, with the adapter on it."""
    set_seed(0)
    plain = tiny_llama()
    folder = Path(args.out) / "base"
    if args.pretrained:
        if settings.process_index == 0 and not folder.exists():
            plain.save_pretrained(folder)
        torch.distributed.barrier()
        plain = LlamaForCausalLM.from_pretrained(folder)
    set_seed(1)
    return get_peft_model(plain, adapter(args.method))


def main() -> None:
    """Train; or, with --resume, train on from the checkpoint of a run before, in a process of its own."""
    parser = arguments(method="lora", pretrained=False, checkpointing="", input_grads=False, resume="", use_cpu="True")
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")  # real DeepSpeed's zero.Init counts one rank where it has not started them
    settings = TrainingArguments(
        output_dir=args.out,
        deepspeed=args.deepspeed,
        use_cpu=args.use_cpu == "True",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_checkpointing=bool(args.checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": args.checkpointing == "reentrant"}
        if args.checkpointing
        else None,
        learning_rate=2e-2,
        warmup_steps=1,
        logging_steps=1,
        save_steps=2,
        save_total_limit=2,
        report_to=[],
    )
    model = make(args, settings)
    if args.input_grads:
        model.enable_input_require_grads()
    trainable, total = model.get_nb_trainable_parameters()
    trainer = Trainer(
        model=model, args=settings, train_dataset=token_samples(64), eval_dataset=token_samples(6, seed=3)
    )
    base = {n: whole(p) for n, p in model.named_parameters() if not p.requires_grad}
    trainer.train(resume_from_checkpoint=args.resume or None)
    metrics = trainer.evaluate()
    trainer.save_model(f"{args.out}/adapter")
    torch.distributed.barrier()
    for name, p in model.named_parameters():
        assert name not in base or torch.equal(whole(p), base[name]), f"{name} is frozen, and has changed"
    figures = {"trainable": trainable, "total": total, "eval_loss": metrics["eval_loss"]}
    figures |= exports(args, model, trainer.eval_dataset)
    if settings.process_index == 0:
        record(args.out, steps_of(trainer), **figures)


def whole(p: nn.Parameter) -> torch.Tensor:
    """The values of a parameter, wherever they are."""
    with deepspeed.zero.GatheredParameters([p]):
        return p.detach().clone()


def loss_of(model: nn.Module, samples: list[dict[str, torch.Tensor]]) -> float:
    """On all of them at once."""
    model.eval()
    with torch.no_grad():
        return model(**{key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}).loss.item()


def in_file(name: str) -> str:
    """What the adapter's file calls a parameter."""
    return name.replace("modules_to_save.", "").replace("vector.default.weight", "vector").replace(".default", "")


def exports(args: Any, model: Any, samples: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The adapter's file has the values; loaded, and merged, it answers as the model that was trained."""
    expected = loss_of(model, samples)
    saved = load_file(f"{args.out}/adapter/adapter_model.safetensors")
    own = {in_file(name): p for name, p in model.named_parameters() if p.requires_grad}
    assert set(own) <= set(saved), f"not in the adapter's file: {sorted(set(own) - set(saved))}"
    for name, p in own.items():
        torch.testing.assert_close(saved[name], whole(p), rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    with torch.random.fork_rng():
        set_seed(0)
        again = PeftModel.from_pretrained(tiny_llama(), f"{args.out}/adapter")
    merged = again.merge_and_unload()
    assert abs(loss_of(merged, samples) - expected) < CLOSE, "the adapter, loaded and merged, is another one"
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.merge_adapter()
    assert abs(loss_of(model, samples) - expected) < CLOSE, "merged where it was trained, it is another one"
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.unmerge_adapter()
    assert abs(loss_of(model, samples) - expected) < CLOSE, "unmerged, it is not what it was"
    return {"whole_loss": expected, "sum": sum(float(value.double().abs().sum()) for value in saved.values())}


if __name__ == "__main__":
    main()
