"""KTOTrainer: words that were liked, and words that were not."""

from datasets import Dataset
from tiny import arguments
from trl import KTOConfig, KTOTrainer
from trl_tiny import finish, saved_model, sentences, settings

args = arguments().parse_args()
model = saved_model(args.out)
columns = {"prompt": sentences(32, 6, seed=1), "completion": sentences(32, 6, seed=2)}
data = Dataset.from_dict({**columns, "label": [n % 2 == 0 for n in range(32)]})
trainer = KTOTrainer(model=model, args=KTOConfig(**settings(args)), train_dataset=data)
finish(trainer, args)
