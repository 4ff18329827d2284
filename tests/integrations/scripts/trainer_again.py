"""Several Trainers in one process: evaluate, train, train on, another model and stage; a config that disagrees."""

import gc
import json

import torch
from accelerate.state import AcceleratorState
from tiny import record, steps_of, tiny_llama, token_samples
from trainer_flags import parse
from transformers import Trainer, TrainingArguments, set_seed

run, settings = parse(TrainingArguments)


def trainer_of(arguments, seed):
    """A Trainer of a model of its own."""
    set_seed(seed)
    data = {"train_dataset": token_samples(run.samples), "eval_dataset": token_samples(8, seed=2)}
    return Trainer(model=tiny_llama(), args=arguments, **data)


def again(stage, **changes):
    """TrainingArguments anew, from a dict, after Accelerate has forgotten the last."""
    AcceleratorState._reset_state(reset_partial_state=False)
    with open(settings.deepspeed) as file:
        config = json.load(file)
    config["zero_optimization"]["stage"] = stage
    return TrainingArguments(**{**settings.to_dict(), "deepspeed": config, **changes})


first = trainer_of(settings, 0)
metrics = {}
if run.generate:  # stage 3 alone evaluates before it trains
    metrics["untrained"] = first.evaluate()["eval_loss"]
    first.model_wrapped = first.model
first.train()
steps = steps_of(first)
metrics["first"] = first.evaluate()["eval_loss"]
first.model_wrapped = first.model  # train() destroys the last engine, and would go on with it
first.train()
steps += steps_of(first)
metrics["again"] = first.evaluate()["eval_loss"]
first.accelerator.free_memory()
del first
gc.collect()

for stage in (2, 3):
    other = trainer_of(again(stage), 1)
    other.train()
    steps += steps_of(other)
    metrics[f"stage {stage}"] = other.evaluate()["eval_loss"]
    other.accelerator.free_memory()

try:
    wrong = again(3, gradient_accumulation_steps=2)
    wrong.hf_deepspeed_config.config["gradient_accumulation_steps"] = 3
    wrong.hf_deepspeed_config.trainer_config_process(wrong)
    trainer_of(wrong, 1).train()
except ValueError as error:
    metrics["mismatch"] = "gradient_accumulation_steps=3 vs hf gradient_accumulation_steps=2" in str(error)
if torch.distributed.get_rank() == 0:
    record(run.out, steps, **metrics)
