"""Where configurations come from, and the search for better ones: what a program calls."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from tritonspeed.comm import Mesh
from tritonspeed.kernels import tuned
from tritonspeed.kernels._triton import card_of
from tritonspeed.kernels.store import SHIPPED, FolderStore, Layers, default_folder
from tritonspeed.kernels.tuned import stores_in_use, use_stores
from tritonspeed.tuning.case import Case
from tritonspeed.tuning.gpu import check_alone
from tritonspeed.tuning.planning import OnProgress, plan
from tritonspeed.tuning.ranks import tune_on_rank_zero
from tritonspeed.tuning.timing import interleaved_ms
from tritonspeed.tuning.tuner import Outcome, Search, Timer, Tuner

Directory = str | os.PathLike[str]


def use(directory: Directory | None = None, *, deterministic: bool = False) -> None:
    """Choose where this process looks for tuned launch configurations, from now on.

    A program that never calls this looks into ``~/.cache/tritonspeed/tuned``, where ``tritonspeed tune`` writes, and
    into what is shipped with the package; nothing is opened before the first kernel is launched.

    Args:
        directory: the user's folder; None is the default one. It need not exist.
        deterministic: leave the user's folder out: shipped configurations and heuristics alone, so that the same
            version of this package launches the same on every machine with such a card.

    Raises:
        ValueError: a directory together with ``deterministic``.
    """
    if deterministic and directory is not None:
        raise ValueError(
            f"tuning.use: directory {os.fspath(directory)!r} is the user's own and deterministic=True leaves that out:"
            " drop one of the two"
        )
    folder = None if deterministic else default_folder() if directory is None else Path(directory)
    use_stores([Layers([FolderStore(one) for one in (folder, SHIPPED) if one is not None])])


def use_unless_chosen(directory: Directory | None) -> None:
    """``use(directory)``, if there is one and the program has not chosen: what an environment variable may do."""
    if directory is not None and not tuned.are_chosen():
        use(directory)


def tune(
    cases: Iterable[Case],
    directory: Directory | None = None,
    *,
    names: Iterable[str] | None = None,
    search: Search | None = None,
    mesh: Mesh | None = None,
    device: torch.device | None = None,
    timer: Timer = interleaved_ms,
    on_progress: OnProgress | None = None,
) -> list[Outcome]:
    """Search for the configurations that these cases run fastest with, write them down, and use them.

    Compiles in other processes: a script that calls this has its ``if __name__ == "__main__":``.

    Args:
        cases: of ``tuning.cases.all_cases``, or your own.
        directory: where results go; None is the user's default folder.
        names: tunables or operations to keep to; None is all that the cases depend on.
        search: how long and how thoroughly.
        mesh: with several ranks, a collective: rank 0 tunes, the others wait, all use what it found.
        device: the GPU; None is the mesh's, or the current one.
        timer: who takes the times.
        on_progress: hears (what, done, of how many), on every rank.

    Returns:
        An outcome for each decision.

    Raises:
        ValueError: no GPU, another process on it, or a folder that cannot be written.
        RuntimeError: a rank failed, or ranks disagree.
    """
    device = device or (mesh.device if mesh is not None else torch.device("cuda"))
    if timer is interleaved_ms:
        check_device(device)
    card = card_of(torch.empty(0, device=device))
    cases, names = list(cases), None if names is None else list(names)

    def run(tell: OnProgress | None) -> list[Outcome]:
        folder = default_folder() if directory is None else Path(directory)
        if folder is None:
            raise ValueError("tune: this user has no home folder to keep results in: name a directory")
        if timer is interleaved_ms:
            check_alone(device)
        tuner = Tuner(card, device, FolderStore(folder), search or Search(), timer, tell)
        return tuner.run(plan(cases, card, names))

    if mesh is not None and mesh.world > 1:
        return tune_on_rank_zero(mesh, card, run, on_progress)
    outcomes = run(on_progress)
    for store in stores_in_use():
        if isinstance(store, (FolderStore, Layers)):
            store.forget()
    use_stores(stores_in_use())
    return outcomes


def check_device(device: torch.device) -> None:
    """Raises:
    ValueError: kernels cannot be timed on this device, and why.
    """
    if device.type != "cuda":
        raise ValueError(f"tune: {device} has no kernels to time: kernels are tuned on NVIDIA and AMD GPUs")
    if not torch.cuda.is_available():
        raise ValueError(
            "tune: there is no GPU here, so there is nothing to time; every kernel takes the configuration that its"
            " heuristic works out. `tritonspeed tune --list --card sm_90` shows what would be tuned on a card"
        )
