"""SFTTrainer on conversations, where only the assistant's words count; or on packed text with LoRA."""

from datasets import Dataset
from peft import LoraConfig
from tiny import arguments
from trl import SFTConfig, SFTTrainer
from trl_tiny import finish, saved_model, sentences, settings

args = arguments(lora=False).parse_args()
model = saved_model(args.out)
if args.lora:
    data = Dataset.from_dict({"text": sentences(64, 12, seed=1)})
    chosen = {"packing": True, "max_length": 32, "gradient_checkpointing": False}
else:
    turns = zip(sentences(32, 8, seed=1), sentences(32, 6, seed=2), strict=True)
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
    data, chosen = Dataset.from_dict({"messages": rows}), {"assistant_only_loss": True}
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(**settings(args, **chosen)),
    train_dataset=data,
    peft_config=LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM") if args.lora else None,
)
finish(trainer, args)
