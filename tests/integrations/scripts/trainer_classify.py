"""Trainer on a classifier: padded texts of different lengths, a collator, weight decay by groups."""

import torch
from tiny import VOCABULARY, record, steps_of
from trainer_flags import parse
from trainer_models import tiny_model
from transformers import Trainer, TrainingArguments, set_seed

run, settings = parse(TrainingArguments)
set_seed(0)


def texts(count, seed):
    """Random tokens; the class is the first one's remainder."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 17, (count,), generator=generator).tolist()
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "label": int(row[0]) % 3} for row in rows]


def pad(samples):
    """To the longest."""
    ids = torch.nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], batch_first=True)
    labels = torch.tensor([s["label"] for s in samples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


trainer = Trainer(
    model=tiny_model(run.model),
    args=settings,
    data_collator=pad,
    train_dataset=texts(run.samples, 1),
    eval_dataset=texts(9, 2),
    compute_metrics=accuracy,
)
trainer.train()
metrics = trainer.evaluate()
if settings.process_index == 0:
    record(run.out, steps_of(trainer), eval_loss=metrics["eval_loss"], eval_accuracy=metrics["eval_accuracy"])
