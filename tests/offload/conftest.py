"""A folder of the disk tier whose tiles are small, so that small flats have several."""

import pytest
from folders import SMALL

from tritonspeed.offload import disk_flat
from tritonspeed.offload.disk import DiskFolder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_flat, "TILE_BYTES", 16384)
    folder = DiskFolder(tmp_path, 1, 2, SMALL)
    yield folder
    folder.close()
