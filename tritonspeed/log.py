"""The package's log, heard where a program has set up none: facts of a run are printed nowhere else."""

import logging


def speak() -> None:
    """Send the log to standard error, unless somebody listens already."""
    log = logging.getLogger("tritonspeed")
    if log.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[tritonspeed] %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
