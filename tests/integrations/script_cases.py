"""The scripts, with their arguments and configs, that run here and under real DeepSpeed with the same numbers.

`tests/integrations` runs each case under tritonspeed and compares its record with the one that real DeepSpeed wrote
(`recorded/`, made by `python -m bench.peers.scripts --record`); that bench also runs both side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
RECORDED = Path(__file__).parent / "recorded"


@dataclass(frozen=True)
class Case:
    """One run of one script on two ranks.

    Attributes:
        name: unique; names the record.
        script: file in ``scripts/``.
        config: its ds_config.json.
        arguments: of the script, besides --deepspeed and --out.
        no_peer: why real DeepSpeed cannot run it here; "" where it can.
        close: decimals to which figures agree with real DeepSpeed's, where a reason (``why``) keeps them from four.
        why: that reason.
    """

    name: str
    script: str
    config: dict[str, Any]
    arguments: tuple[str, ...] = ()
    no_peer: str = ""
    close: int = 4
    why: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A config as they are commonly written: everything "auto"."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **more,
    }


TRAINER = [Case(f"trainer_causal-stage{stage}", "trainer_causal.py", zero(stage)) for stage in (0, 1, 2, 3)]
CASES = [*TRAINER]
