"""A Trainer at stage 3 that is watched: a callback traces its second and third step."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "integrations" / "scripts"))

import deepspeed
from tiny import steps_of, tiny_llama, token_samples
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed")
parser.add_argument("--out")
parser.add_argument("--local_rank", type=int, default=0)
run = parser.parse_args()

settings = TrainingArguments(
    output_dir=run.out,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=4,
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
    deepspeed=run.deepspeed,
)
set_seed(0)


class Traced(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            engine: Any = trainer.model_wrapped
            self.trace = engine.trace(steps=2, folder=run.out)


traced = Traced()
trainer = Trainer(model=tiny_llama(), args=settings, train_dataset=token_samples(32), callbacks=[traced])
trainer.train()
summary = deepspeed.comm.log_summary(return_dict=True)["summary"]
if settings.process_index == 0:
    facts = {
        "trace": str(traced.trace.json_path),
        "operations": sorted(summary),
        "steps": steps_of(trainer),
        "counted": deepspeed.comm.get_comm_operation_count(),
    }
    Path(run.out, "facts.json").write_text(json.dumps(facts))
