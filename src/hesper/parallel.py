"""One job on several processes, as torchrun starts them: who does what share, and the few things they tell each other.

What is exchanged lies in main memory, sums in float64 among it, so the gloo backend serves processors and CUDA devices alike.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hesper.errors import HesperError, Interrupted, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TIMEOUT", "Alone", "Team", "jointly", "leads", "team"]

TIMEOUT = "HESPER_TIMEOUT"
_SECONDS = 1800.0  # one process may still be at work on its share while the others wait
_LONGEST = 1e8
_CONNECT = datetime.timedelta(seconds=300)

T = TypeVar("T")


class Team(Protocol):
    """The processes that do one job together; each calls the same methods in the same order."""

    rank: int
    size: int

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, the same on all of them."""

    def every(self, value: T) -> list[T]:
        """The values of all processes, by rank."""

    def first(self, value: T) -> T:
        """The value that the process of rank 0 has."""

    def says(self, sentence: str) -> bool:
        """Whether this process is the first to say ``sentence``, so that it is said once."""


class Alone:
    """The team of one process.

    >>> Alone().every("mine"), Alone().first("mine")
    (['mine'], 'mine')
    """

    rank, size = 0, 1

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to add."""

    def every(self, value: T) -> list[T]:
        """This process's value."""
        return [value]

    def first(self, value: T) -> T:
        """This process's value."""
        return value

    def says(self, sentence: str) -> bool:
        """Nobody else speaks."""
        return True


class _Gang:
    """Processes connected by torch.distributed."""

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self.rank, self.size, self._store = rank, size, store

    def sum(self, tensors: Iterable[Tensor]) -> None:
        from torch import distributed

        with self._listening():
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def every(self, value: T) -> list[T]:
        from torch import distributed

        found: list[Any] = [None] * self.size
        with self._listening():
            distributed.all_gather_object(found, value)
        return found

    def first(self, value: T) -> T:
        from torch import distributed

        found: list[Any] = [value]
        with self._listening():
            distributed.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[no-any-return]

    def says(self, sentence: str) -> bool:
        try:
            return int(self._store.add(f"hesper/said/{sentence}", 1)) == 1
        except RuntimeError:  # the store went with the process that kept it
            return True

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise Interrupted(f"one of the {self.size} processes died or fell silent; run the same command again") from error


def jointly(team: Team, task: Callable[[], T]) -> T:
    """What ``task`` gives in this process; where it fails in one of them, all raise the first one's error.

    A process that went on alone would wait for the one that failed, and take it for dead.

    Example:
        >>> jointly(Alone(), lambda: 3)
        3
    """
    found: list[T] = []
    failure: Exception | None = None
    try:
        found.append(task())
    except Interrupted:  # its process ends here, and the others find it gone
        raise
    except (HesperError, OSError, MemoryError) as error:
        failure = error
    for each in team.every(failure):
        if each is not None:
            raise each
    return found[0]


def leads() -> bool:
    """Whether this process is the one that writes and prints: the only one, or that of rank 0."""
    return not _many() or os.environ["RANK"] == "0"


@functools.cache
def team() -> Team:
    """The team this process belongs to, as torchrun's environment names it; the same at every call.

    UsageError when the processes cannot be connected.
    """
    if not _many():
        return Alone()
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    limit = datetime.timedelta(seconds=_timeout())
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=min(limit, _CONNECT))))
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the {os.environ['WORLD_SIZE']} processes cannot be connected ({str(error).splitlines()[0]}); start them with torchrun"
        ) from error
    # A thread that still listens when the interpreter is gone aborts the process, whatever it has finished.
    atexit.register(lambda: distributed.destroy_process_group() if distributed.is_initialized() else None)
    return _Gang(rank, size, store)


def _many() -> bool:
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def _timeout() -> float:
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text) if text else _SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < _LONGEST:
        raise UsageError(f"{TIMEOUT} is {text!r}; give the seconds, above 0, after which a silent process counts as dead")
    return seconds
