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


def asked_for() -> logging.Logger:
    """Where a config's own requests are logged: its tables are wanted even where the package was told to be quieter.

    Hugging Face's Trainer sets the level of DeepSpeed's logger to its own, warnings, whatever the config enables.
    """
    log = logging.getLogger("tritonspeed.asked")
    log.setLevel(logging.INFO)
    return log
