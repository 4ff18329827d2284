"""DPOTrainer: the reference model is kept beside the policy and follows it, or is asked once before training."""

from datasets import Dataset, load_from_disk
from tiny import arguments
from trl import DPOConfig, DPOTrainer
from trl_tiny import finish, saved_model, sentences, settings

args = arguments(precompute=False).parse_args()
model = saved_model(args.out)
columns = {name: sentences(32, 6, seed) for seed, name in enumerate(("prompt", "chosen", "rejected"))}
follow = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2}
chosen = {"precompute_ref_log_probs": True} if args.precompute else follow
config = DPOConfig(**settings(args, **chosen))
with config.main_process_first():  # a data set with a folder: what is asked once is kept there, for all ranks
    if config.process_index == 0:
        Dataset.from_dict(columns).save_to_disk(f"{args.out}/data")
data = load_from_disk(f"{args.out}/data")
trainer = DPOTrainer(model=model, args=config, train_dataset=data)
finish(trainer, args)
