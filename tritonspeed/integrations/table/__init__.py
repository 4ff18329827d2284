"""DeepSpeed's names, row by row, by subject: ``engine``, ``partitioning``, ``communication``, ``elsewhere``.

``rows`` says what a row is; ``reasons`` why something is not provided. Data alone: nothing here imports torch.
"""

from tritonspeed.integrations.table import communication, elsewhere, engine, partitioning
from tritonspeed.integrations.table.reasons import REASONS
from tritonspeed.integrations.table.rows import Name, Rows, Verdict

MODULES: dict[str, Rows] = {
    **engine.MODULES,
    **partitioning.MODULES,
    **communication.MODULES,
    **elsewhere.MODULES,
}
"""{module of DeepSpeed: its names}. A module that is not here is refused, by ``REASONS``."""

__all__ = ["MODULES", "REASONS", "Name", "Rows", "Verdict"]
