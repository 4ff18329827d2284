"""Trainer on a causal language model: a few steps, then evaluate, predict, and generate if asked."""

import torch
from tiny import record, steps_of, token_samples
from trainer_flags import parse
from trainer_models import tiny_model
from transformers import Trainer, TrainingArguments, set_seed

run, settings = parse(TrainingArguments)
set_seed(0)


def accuracy(predicted):
    """Of the next token."""
    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    hits = logits[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
    return {"accuracy": float(hits.mean()), "logits": float(abs(logits).mean())}


train, held_out = token_samples(run.samples), token_samples(9, seed=2)
trainer = Trainer(
    model=tiny_model(run.model),
    args=settings,
    train_dataset=train,
    eval_dataset=held_out,
    compute_metrics=accuracy,
)
trainer.train()
metrics = {key: value for key, value in trainer.evaluate().items() if key in ("eval_loss", "eval_accuracy")}
predicted = trainer.predict(token_samples(5, seed=3))
metrics.update(predicted=list(predicted.predictions.shape), test_logits=predicted.metrics["test_logits"])
metrics["evaluations"] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
if run.generate:
    prompt = torch.tensor([[5, 6, 7 + settings.process_index]])
    lengths = 4 + 3 * settings.process_index  # the ranks end at different times
    made = trainer.model.generate(prompt, max_new_tokens=lengths, do_sample=False, synced_gpus=True, eos_token_id=None)
    metrics["generated"] = made[0].tolist()
if settings.process_index == 0:
    record(run.out, steps_of(trainer), **metrics)
