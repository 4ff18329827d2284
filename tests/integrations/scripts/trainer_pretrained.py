"""from_pretrained under zero.Init, embeddings resized before and after training; what the model says at each point."""

import contextlib
import os

import deepspeed
import torch
from tiny import record, steps_of, token_samples
from trainer_flags import parse
from trainer_models import config_of, kind_of
from transformers import Trainer, TrainingArguments, set_seed


def sum_of(model):
    """Of the magnitudes of all weights."""
    total = 0.0
    for p in model.parameters():
        whole = deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext()
        with whole:
            total += p.detach().double().abs().sum().item()
    return total


def held_bytes(model):
    """That this rank keeps of the weights."""
    own = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(own.values()) + sum(p.ds_tensor.nbytes for p in model.parameters() if hasattr(p, "ds_id"))


rank = int(os.environ["RANK"])
run, settings = parse(TrainingArguments)
base = f"{run.out}/base"
if rank == 0:  # a checkpoint as it comes from elsewhere, without a layer's norms
    set_seed(7)
    config = config_of(run.model, **{"n_embd" if run.model == "gpt2" else "hidden_size": 64})
    whole = kind_of(run.model)._model_mapping[type(config)](config)  # not under zero.Init
    norms = (".1.input_layernorm.weight", ".1.post_attention_layernorm.weight", ".1.ln_1.weight", ".1.ln_1.bias")
    weights = {name: value for name, value in whole.state_dict().items() if not name.endswith(norms)}
    whole.save_pretrained(base, state_dict=weights)
if not deepspeed.comm.is_initialized():
    deepspeed.init_distributed()
torch.distributed.barrier()

set_seed(0)
model, loading = kind_of(run.model).from_pretrained(base, output_loading_info=True)
metrics = {
    "missing": sorted(loading["missing_keys"]),
    "loaded": sum_of(model),
    "whole": sum(p.ds_numel if hasattr(p, "ds_id") else p.numel() for p in model.parameters()),
}
bytes_held = held_bytes(model)
model.resize_token_embeddings(72)
metrics["resized"] = sum_of(model)
train = token_samples(run.samples)
trainer = Trainer(model=model, args=settings, train_dataset=train, eval_dataset=token_samples(8, seed=2))
trainer.train()
metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
trainer.save_model(f"{run.out}/final")
if run.resize_again:  # real DeepSpeed fails in the forward that follows
    model.resize_token_embeddings(80, mean_resizing=False)
    with torch.no_grad():
        ids = torch.full((1, 4), 79)
        metrics["again"] = list(model(input_ids=ids).logits.shape)
if settings.process_index == 0:
    record(run.out, steps_of(trainer), **metrics)
print(f"rank {rank} holds {bytes_held} bytes of {4 * metrics['whole']}")
