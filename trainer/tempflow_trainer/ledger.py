"""Whose run it is, and which checkpoints count: claims and commits, one create-only entry each.

The rules are in ``checkpoint_layout``; here is what asks the store. See docs/checkpoints.md.
"""

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from tempflow_api import checkpoint_layout as layout
from tempflow_api.checkpoint_layout import Entry, Folder
from tempflow_api.errors import CheckpointCorrupt, Fenced, StoreUnavailable
from tempflow_trainer.store_base import Store

log = logging.getLogger(__name__)

MOST_RACES = 20
"""Entries of others that may come between; more is not a race but a store that forgets."""


@dataclass(frozen=True)
class View:
    """What a store shows of a run."""

    newest: Entry | None
    committed: list[Folder]
    """Newest first."""


def look(store: Store) -> View:
    """Which checkpoints count now.

    Raises:
        CheckpointCorrupt: the entry that decides cannot be understood.
    """
    complete = [
        key.split("/")[1]
        for key in store.find(layout.CHECKPOINTS)
        if key.endswith(f"/{layout.MANIFEST}") and key.count("/") == 2
    ]
    number = layout.newest_entry(store.find(layout.LEDGER))
    newest = None if number is None else _read(store, number)
    return View(newest, layout.committed(complete, newest))


class Ledger:
    """A start's hold on the run, from its claim to the entry of a newer start.

    Not for several threads at once.
    """

    def __init__(self, store: Store, newest: Entry) -> None:
        """Made by ``claim``."""
        self._store = store
        self._newest = newest

    @property
    def newest(self) -> Entry:
        """The last entry that is this start's own."""
        return self._newest

    @classmethod
    def claim(
        cls, store: Store, attempt: int, choose: Callable[[Sequence[Folder]], Folder | None]
    ) -> "Ledger":
        """Take the run over from all starts before this one.

        Args:
            choose: finds the checkpoint to continue from among those that count, newest first. It
                is asked again when another one is committed meanwhile.

        Raises:
            Fenced: a later attempt has the run already.
        """
        for _ in range(MOST_RACES):
            view = look(store)
            before = view.newest
            if before is not None and before.attempt > attempt:
                raise Fenced(
                    f"{store.uri} belongs to {before.owner}, and this is a start of "
                    f"attempt {attempt}"
                )
            try:
                resumed = choose(view.committed)
            except CheckpointCorrupt:
                if look(store).newest == before:
                    raise
                continue  # a start that is still alive has let go of them meanwhile
            kept = view.committed[view.committed.index(resumed) :] if resumed else []
            same = before is not None and before.attempt == attempt
            entry = Entry(
                number=before.number + 1 if before else 1,
                action="claim",
                attempt=attempt,
                incarnation=before.incarnation + 1 if before and same else 1,
                nonce=uuid.uuid4().hex,
                time=_now(),
                resumed_from=resumed.name if resumed else None,
                skipped=[f.name for f in view.committed if f not in kept] if resumed else [],
                committed=[folder.name for folder in kept],
            )
            if _create(store, entry) is None:
                return cls(store, entry)
        raise StoreUnavailable(f"{store.uri}: {MOST_RACES} other starts of this run came between")

    def check(self, store: Store | None = None) -> None:
        """Ask whether the run is still this start's, before much is written for nothing.

        Raises:
            Fenced: it is not.
        """
        store = store or self._store
        number = layout.newest_entry(store.find(layout.LEDGER)) or 0
        if number > self._newest.number:
            self._adopt(_read(store, number))

    def commit(
        self, folder: str, retained: Callable[[list[str]], list[str]], store: Store | None = None
    ) -> list[str]:
        """Make the complete checkpoint in ``folder`` count; returns the folders that no longer do.

        Args:
            folder: its name.
            retained: which of the folders that would count, newest first, are kept.
            store: the same store, perhaps with a deadline.

        Raises:
            Fenced: a newer start has taken the run over. Nothing has changed.
        """
        store = store or self._store
        for _ in range(MOST_RACES):
            every = [folder, *self._newest.committed]
            kept = retained(every)
            entry = self._newest.model_copy(
                update={
                    "number": self._newest.number + 1,
                    "action": "commit",
                    "nonce": uuid.uuid4().hex,
                    "time": _now(),
                    "resumed_from": None,
                    "committed": kept,
                }
            )
            there = _create(store, entry)
            if there is None:
                self._newest = entry
                return [name for name in every if name not in kept]
            self._adopt(there)
        raise StoreUnavailable(f"{store.uri}: its ledger does not keep what it took")

    def _adopt(self, found: Entry) -> None:
        """Go on from an entry of this start's own whose reply never came."""
        if found.owner != self._newest.owner:
            raise Fenced(
                f"{found.owner} has taken the run at {self._store.uri} over from "
                f"{self._newest.owner}; what this one writes no longer counts, so it stops"
            )
        if found.action == "prune":
            log.info("somebody has pruned the checkpoints: entry %d of the ledger", found.number)
        else:
            log.warning("entry %d of the ledger was written after all", found.number)
        self._newest = found


def _create(store: Store, entry: Entry) -> Entry | None:
    """Create an entry; another one that has its number already, or None."""
    key = layout.entry_key(entry.number)
    try:
        created = store.create(key, entry.model_dump_json(by_alias=True, indent=1).encode())
    except StoreUnavailable:
        # Whether it was applied is open; the next thing written shows.
        if key not in store.find(key):
            raise
        created = False
    if created:
        return None
    there = _read(store, entry.number)
    return None if there.nonce == entry.nonce else there


def _read(store: Store, number: int) -> Entry:
    key = layout.entry_key(number)
    try:
        return Entry.model_validate_json(store.read(key))
    except ValidationError as error:
        raise CheckpointCorrupt(
            f"{store.uri}/{key} is damaged, and it says which checkpoints count; remove it to go "
            "back to the entry before"
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
