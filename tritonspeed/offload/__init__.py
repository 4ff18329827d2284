"""Where training state lives while it is not in use: tiers, pinned host memory, files of safetensors, the stream.

Bottom up: ``tiers`` the places and what is asked of one · ``options`` what the config says of them · ``memory`` host
buffers that begin on a page · ``heap`` freed blocks go back to the system · ``page_file`` safetensors whose tensors do
too · ``direct`` reads and writes around the page cache · ``runs``, ``disk_flat``, ``commit_record``, ``disk`` a rank's
folder: two slots for everything, a record of which of them count · ``stream`` fetch ahead, store behind.
"""

from tritonspeed.offload.options import Offload, Requests
from tritonspeed.offload.tiers import Tier

__all__ = ["Offload", "Requests", "Tier"]
