"""GRPOTrainer and RLOOTrainer: words are sampled, a function and a reward model judge them, a reference holds back."""

import trl
from datasets import Dataset
from tiny import arguments
from transformers import AutoModelForSequenceClassification
from trl_tiny import finish, saved_model, sentences, settings, tokenizer

args = arguments(algorithm="GRPO", whole=False).parse_args()


def short(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Fewer words, more reward."""
    return [-0.1 * len(words) for words in completion_ids]


policy, judge = saved_model(args.out), saved_model(args.out, seed=5, scores=True)
chosen = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 4, "beta": 0.1}
follow = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2}
shown = {"log_completions": True, "num_completions_to_print": 1, "ds3_gather_for_generation": args.whole}
config = getattr(trl, f"{args.algorithm}Config")(**settings(args, **chosen, **follow, **shown))
trainer = getattr(trl, f"{args.algorithm}Trainer")(
    model=policy,
    args=config,
    reward_funcs=[short, AutoModelForSequenceClassification.from_pretrained(judge)],
    reward_processing_classes=[None, tokenizer()],
    train_dataset=Dataset.from_dict({"prompt": sentences(16, 6, seed=1)}),
)
finish(trainer, args)
