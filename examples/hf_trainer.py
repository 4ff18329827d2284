"""Hugging Face's Trainer with a ds_config.json, and nothing else: a language model of the standard library's source.

tritonspeed run --num_gpus 2 examples/hf_trainer.py --deepspeed examples/hf_zero3.json --output_dir out

Nothing is downloaded: the tokens are bytes, the text is Python's own source, the model is made from a config. Where no
GPU is, add --use_cpu. The same script and config run under real DeepSpeed.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

LENGTH = 128  # bytes of a sample


@dataclass
class Model:
    """How large a model to make."""

    hidden_size: int = 128
    num_layers: int = 4


class Text(Dataset):
    """(LENGTH,) bytes a sample; Trainer's default collator stacks them."""

    def __init__(self, files: list[Path]) -> None:
        text = bytearray(b"\n".join(path.read_bytes() for path in files))
        tokens = torch.frombuffer(text, dtype=torch.uint8)
        self.rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}


size, settings = HfArgumentParser((Model, TrainingArguments)).parse_args_into_dataclasses()
set_seed(settings.seed)
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
config = LlamaConfig(
    vocab_size=256,
    hidden_size=size.hidden_size,
    intermediate_size=3 * size.hidden_size,
    num_hidden_layers=size.num_layers,
    num_attention_heads=max(1, size.hidden_size // 32),
    num_key_value_heads=max(1, size.hidden_size // 32),
    max_position_embeddings=2 * LENGTH,
)
model = LlamaForCausalLM(config)
trainer = Trainer(model=model, args=settings, train_dataset=Text(files[8:]), eval_dataset=Text(files[:4]))
trainer.train()
print(trainer.evaluate())
trainer.save_model()  # stage 3 gathers; from_pretrained opens it

prompt = torch.tensor([list(b"def ")], device=model.device)
written = model.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)  # every rank takes part
if settings.process_index == 0:
    print(bytes(written[0].tolist()).decode(errors="replace"))
