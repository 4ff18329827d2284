"""tritonspeed: your ds_config.json, pure Python."""

from tritonspeed.version import __version__

__all__ = ["__version__"]
