"""Trainer that saves as it goes, reloads its best, and resumes where told; dropout makes random states count."""

import os

from tiny import record, steps_of, tiny_llama, token_samples
from trainer_flags import parse
from transformers import Trainer, TrainingArguments, set_seed

run, settings = parse(TrainingArguments)
set_seed(0)
trainer = Trainer(
    model=tiny_llama(attention_dropout=0.2),
    args=settings,
    train_dataset=token_samples(run.samples),
    eval_dataset=token_samples(8, seed=2),
)
trainer.train(resume_from_checkpoint=f"{run.out}/{run.resume}" if run.resume else None)
metrics = trainer.evaluate()
trainer.save_model(f"{run.out}/final")
if settings.process_index == 0:
    record(
        run.out,
        steps_of(trainer),
        eval_loss=metrics["eval_loss"],
        best=trainer.state.best_metric,
        best_checkpoint=os.path.basename(trainer.state.best_model_checkpoint or ""),
        checkpoints=sorted(name for name in os.listdir(run.out) if name.startswith("checkpoint-")),
    )
