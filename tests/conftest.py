"""Fixtures that every test may use: real ranks, and one thread so that two ranks on two cores do not fight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ranks import Worlds

from tritonspeed.integrations.finder import SAID_VARIABLE
from tritonspeed.kernels.tuned import use_stores


@pytest.fixture(scope="session")
def ranks() -> Iterator[Worlds]:
    """``ranks(world_size, function, *args)`` runs a module-level function on that many gloo ranks."""
    worlds = Worlds()
    yield worlds
    worlds.stop()


@pytest.fixture(autouse=True, scope="session")
def _untuned() -> None:
    """Heuristics launch, whatever this machine's user has tuned."""
    use_stores([])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """That `deepspeed` is tritonspeed has not been said yet: a run that one test starts knows of no other test's."""
    monkeypatch.setenv(SAID_VARIABLE, "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
