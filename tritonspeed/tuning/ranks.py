"""One rank tunes, all take what it found, and all make sure of it.

Rank 0 searches; after every step of its search it says so to the others, who wait in a broadcast no longer than one
step takes: so no timeout of a collective ends a search of an hour, and every rank has progress to show. A failure of
rank 0 is passed on as its words. In the end each rank works out what it would launch, and a checksum of it is compared.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from tritonspeed.comm import Mesh, broadcast_text, exchange, gather_texts
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.tuned import TUNABLES, features_key, fields_of, stores_in_use, use_stores
from tritonspeed.tuning.planning import OnProgress, import_all_tunables
from tritonspeed.tuning.tuner import Outcome

UNIT = "tuning"  # under which flight logs know these messages
_DIGEST_BYTES = 6  # of each of two parts: whole numbers that a float64 holds


class GivenStore:
    """What rank 0 found, in memory: it need not share a disk with us."""

    def __init__(self, card_key: str, outcomes: Sequence[Outcome]) -> None:
        self.card_key = card_key
        self._found = {(o.tunable, o.source, features_key(o.features)): o.launch for o in outcomes if o.launch}

    def lookup(self, card: Card, name: str, source: str, features: str) -> dict[str, int] | None:
        """The configuration, on cards like rank 0's."""
        launch = self._found.get((name, source, features)) if card.key == self.card_key else None
        return None if launch is None else dict(launch)


def tune_on_rank_zero(
    mesh: Mesh, card: Card, search: Callable[[OnProgress], list[Outcome]], on_progress: OnProgress | None = None
) -> list[Outcome]:
    """Run ``search`` on rank 0 and install its outcomes on every rank. Collective.

    Args:
        card: of this rank.
        search: takes what it is to report its progress to; called on rank 0 alone.
        on_progress: of this rank.

    Raises:
        RuntimeError: rank 0 failed, or the ranks would launch differently.
    """
    found = _lead(mesh, card, search, on_progress) if mesh.rank == 0 else _follow(mesh, on_progress)
    outcomes = [_outcome(**fields) for fields in found["outcomes"]]
    # rank 0 too: what it has in its folder may differ from what the others have in theirs
    use_stores([GivenStore(found["card"], outcomes), *stores_in_use()])
    check_agreement(mesh, card, outcomes)
    return outcomes


def _lead(
    mesh: Mesh, card: Card, search: Callable[[OnProgress], list[Outcome]], on_progress: OnProgress | None
) -> dict[str, Any]:
    def say(message: dict[str, Any]) -> dict[str, Any]:
        return json.loads(broadcast_text(mesh, json.dumps(message), 0, UNIT))

    def tell(what: str, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(what, done, total)
        say({"state": "searching", "progress": [what, done, total]})

    try:
        outcomes = search(tell)
    except BaseException as error:
        say({"state": "failed", "why": f"{type(error).__name__}: {error}"})
        raise
    return say({"state": "done", "card": card.key, "outcomes": [asdict(outcome) for outcome in outcomes]})


def _follow(mesh: Mesh, on_progress: OnProgress | None) -> dict[str, Any]:
    while True:
        message = json.loads(broadcast_text(mesh, None, 0, UNIT))
        if message["state"] == "done":
            return message
        if message["state"] == "failed":
            raise RuntimeError(f"rank {mesh.rank}: rank 0 could not tune: {message['why']}")
        if on_progress is not None:
            on_progress(*message["progress"])


def check_agreement(mesh: Mesh, card: Card, outcomes: Sequence[Outcome]) -> None:
    """Make sure that ranks on cards of one kind would launch alike. Collective.

    Raises:
        RuntimeError: they would not; names two ranks and the first decision that differs.
    """
    import_all_tunables()
    mine = {f"{o.tunable} ({features_key(o.features)})": _resolved(card, o) for o in outcomes}
    numbers = [*_digest(json.dumps(mine)), *_digest(card.key)]
    table = exchange(mesh, torch.tensor(numbers, dtype=torch.float64, device=mesh.device)).tolist()
    if all(row[:2] == other[:2] for row in table for other in table if row[2:] == other[2:]):
        return
    everyone = [json.loads(text) for text in gather_texts(mesh, json.dumps([card.key, mine]), UNIT)]
    for rank, (card_key, theirs) in enumerate(everyone):
        first = next(r for r, (key, _) in enumerate(everyone) if key == card_key)
        for decision, launch in everyone[first][1].items():
            if theirs.get(decision) != launch:
                raise RuntimeError(
                    f"ranks {first} and {rank}, both on {card_key}, would launch {decision} differently: {launch} and"
                    f" {theirs.get(decision)}: run the same version of tritonspeed on both, or"
                    " ts.tuning.use(deterministic=True)"
                )


def _outcome(why: list[str], **fields: Any) -> Outcome:
    return Outcome(why=tuple(why), **fields)


def _resolved(card: Card, outcome: Outcome) -> dict[str, int] | None:
    tunable = TUNABLES.get(outcome.tunable)
    return None if tunable is None else fields_of(tunable.resolve(card, **outcome.features))


def _digest(text: str) -> list[float]:
    digest = hashlib.sha256(text.encode()).digest()
    parts = (digest[:_DIGEST_BYTES], digest[_DIGEST_BYTES : 2 * _DIGEST_BYTES])
    return [float(int.from_bytes(part, "big")) for part in parts]
