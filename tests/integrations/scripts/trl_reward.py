"""RewardTrainer on pairs."""

from datasets import Dataset
from tiny import arguments
from trl import RewardConfig, RewardTrainer
from trl_tiny import finish, saved_model, sentences, settings

args = arguments().parse_args()
pairs = {"chosen": sentences(32, 10, seed=1), "rejected": sentences(32, 10, seed=2)}
model = saved_model(args.out, scores=True)
trainer = RewardTrainer(model=model, args=RewardConfig(**settings(args)), train_dataset=Dataset.from_dict(pairs))
finish(trainer, args, scores=True)
