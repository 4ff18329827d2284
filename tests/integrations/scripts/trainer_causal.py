"""Trainer on a causal language model: five steps, then evaluate."""

from tiny import arguments, record, steps_of, tiny_llama, token_samples
from transformers import Trainer, TrainingArguments, set_seed

args = arguments(max_steps=5, accumulation=1, bf16=False).parse_args()
set_seed(0)
settings = TrainingArguments(
    output_dir=args.out,
    deepspeed=args.deepspeed,
    use_cpu=True,
    max_steps=args.max_steps,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=args.accumulation,
    bf16=args.bf16,
    learning_rate=1e-2,
    warmup_steps=1,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
trainer = Trainer(model=tiny_llama(), args=settings, train_dataset=token_samples(64), eval_dataset=token_samples(8))
trainer.train()
metrics = trainer.evaluate()
if settings.process_index == 0:
    record(args.out, steps_of(trainer), eval_loss=metrics["eval_loss"])
