"""What every store of checkpoints promises, and how long a silent one is waited for."""

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tempflow_api.errors import StoreUnavailable

log = logging.getLogger(__name__)
_T = TypeVar("_T")

OUTAGE_SECONDS = 180.0
"""A store that restarts is back by then; an address that is wrong is still told of in minutes."""


class StoreSilent(StoreUnavailable):
    """Nothing answered, or a server that is not whole: this says nothing about the bucket."""


class Store(ABC):
    """Keys are relative paths with forward slashes. Every method raises StoreUnavailable."""

    uri: str

    @abstractmethod
    def put(self, file: Path, key: str) -> None:
        """Write the content of a local file."""

    @abstractmethod
    def create(self, key: str, content: bytes) -> bool:
        """Write a key that must be new; False when it exists, which is then unchanged."""

    @abstractmethod
    def get(self, key: str, file: Path, size: int) -> str:
        """Copy into a local file; returns the SHA-256 of what came.

        Args:
            size: bytes that the key has, as ``find`` says; the store is not asked again.
        """

    @abstractmethod
    def find(self, prefix: str) -> dict[str, int]:
        """Sizes by key of everything below ``prefix``, now."""

    @abstractmethod
    def delete(self, keys: list[str]) -> None:
        """Remove the keys, in that order; those that are gone already are no error."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The content of a small key."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Some bytes of a key; fewer only where it ends before."""

    @abstractmethod
    def below(self, folder: str) -> "Store":
        """The store of a folder in this one."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below ``prefix``."""

    def within(self, seconds: float) -> "Store":
        """The same store, whose requests are over so long from now, by an error if need be; until
        then they are repeated while it is silent."""
        del seconds
        return self

    def probe(self) -> None:
        """Do what a run needs, before it starts: create a key, once only, list, read, delete."""
        key = f".probe-{uuid.uuid4().hex}"
        if not self.create(key, b"probe"):
            raise StoreUnavailable(f"{self.uri}: a fresh key exists already")
        try:
            self._probe_created(key)
        finally:
            self.delete([key])

    def _probe_created(self, key: str) -> None:
        if self.create(key, b"again"):
            raise StoreUnavailable(
                f"{self.uri} overwrites a key that was to be created once (it ignores "
                "If-None-Match): two starts of a run would destroy each other's checkpoints; "
                "update the store, or choose another spec.checkpoint.uri"
            )
        if self.find(key) != {key: len(b"probe")}:
            raise StoreUnavailable(f"{self.uri}: a key that was written is not listed")
        if self.read(key) != b"probe":
            raise StoreUnavailable(f"{self.uri}: a key that was written reads differently")


def when_it_answers(action: Callable[[], _T], patience_seconds: float = OUTAGE_SECONDS) -> _T:
    """Do it; again and again while the store is silent, which a new attempt would not cure.

    Raises:
        StoreUnavailable: it refuses, at once; or it was silent for all that time.
    """
    until, pause = time.monotonic() + patience_seconds, 1.0
    while True:
        try:
            return action()
        except StoreSilent as error:
            if time.monotonic() + pause > until:
                raise
            log.warning("waits for the store: %s", error)
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


class Patient(Store):
    """A store whose silences are waited out up to a moment: an overload, a restart.

    A creation that was applied and whose reply was lost is repeated, too, and says False then:
    whoever creates looks whose content is there.
    """

    def __init__(self, inner: Store, until: float) -> None:
        """
        Args:
            inner: whose own requests end by then.
            until: by ``time.monotonic``.
        """
        self.uri = inner.uri
        self._inner, self._until = inner, until

    def _ask(self, action: Callable[[], _T]) -> _T:
        return when_it_answers(action, self._until - time.monotonic())

    def put(self, file: Path, key: str) -> None:
        self._ask(lambda: self._inner.put(file, key))

    def create(self, key: str, content: bytes) -> bool:
        return self._ask(lambda: self._inner.create(key, content))

    def get(self, key: str, file: Path, size: int) -> str:
        return self._ask(lambda: self._inner.get(key, file, size))

    def find(self, prefix: str) -> dict[str, int]:
        return self._ask(lambda: self._inner.find(prefix))

    def delete(self, keys: list[str]) -> None:
        self._ask(lambda: self._inner.delete(keys))

    def read(self, key: str) -> bytes:
        return self._ask(lambda: self._inner.read(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self._ask(lambda: self._inner.read_range(key, start, length))

    def folders(self, prefix: str) -> list[str]:
        return self._ask(lambda: self._inner.folders(prefix))

    def within(self, seconds: float) -> Store:
        return self._inner.within(min(seconds, self._until - time.monotonic()))

    def below(self, folder: str) -> Store:
        return Patient(self._inner.below(folder), self._until)
