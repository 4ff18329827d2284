"""Seq2SeqTrainer: sources and targets of different lengths, scored by what it generates."""

import torch
from tiny import VOCABULARY, record, steps_of
from trainer_flags import parse
from trainer_models import tiny_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

run, settings = parse(Seq2SeqTrainingArguments)
set_seed(0)


def pairs(count, seed):
    """A target is its source, backwards, without its last token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row.flip(0)[1:]} for row in rows]


def pad(samples):
    """To the longest; labels with what the loss ignores."""
    ids = torch.nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], batch_first=True)
    labels = [s["labels"] for s in samples]
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def score(predicted):
    """How much of it is right, and how long it is."""
    width = min(predicted.predictions.shape[1] - 1, predicted.label_ids.shape[1])
    hits = predicted.predictions[:, 1 : width + 1] == predicted.label_ids[:, :width]
    return {"hits": float(hits.mean()), "tokens": int((predicted.predictions > 0).sum())}


trainer = Seq2SeqTrainer(
    model=tiny_model(run.model),
    args=settings,
    data_collator=pad,
    train_dataset=pairs(run.samples, 1),
    eval_dataset=pairs(9, 2),
    compute_metrics=score,
)
trainer.train()
metrics = trainer.evaluate(max_length=14, num_beams=2)
predicted = trainer.predict(pairs(6, 3), max_length=10)
kept = {key: metrics[key] for key in ("eval_loss", "eval_hits", "eval_tokens")}
if settings.process_index == 0:
    record(run.out, steps_of(trainer), **kept, predicted=predicted.predictions.tolist())
