"""What the ranks tell each other when one of them fails in the midst of a step.

Its peers wait for it in a collective, and would only learn that a connection was lost. So the rank that fails
leaves word in the store through which the ranks met, and the others look there for the reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

PATIENCE_S = 5.0
"""How long a rank looks for the reason of a lost connection."""


class RankFailedError(RuntimeError):
    """Another rank failed, and this one can't go on without it."""


class Failures:
    """Of one engine's ranks."""

    def __init__(self) -> None:
        """Collective."""
        self._rank = dist.get_rank()
        store = dist.distributed_c10d._get_default_store()
        nth = store.add(f"uni3d/failures/{self._rank}", 1)  # ranks make theirs in the same order
        self._store = dist.PrefixStore(f"uni3d/failures/{nth}", store)  # type: ignore[attr-defined]
        self._count = 0  # of what was begun together, the same on all ranks

    @contextmanager
    def told(self, work: str, *, alike: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Around a piece of work that the ranks do together, with a name for it.

        Raises:
            RankFailedError: another rank failed in it; which, and of what. What fails on this rank is raised
                as it is; errors of the types `alike` are those that all ranks raise, and nobody need tell.
        """
        self._count += 1
        try:
            yield
        except alike:
            raise
        except Exception as error:
            if _is_lost_connection(error):
                raise RankFailedError(self._reason(work)) from error
            cause = _cause(error)
            self._tell(work, cause)
            if cause is error:
                raise
            raise cause from None

    def _tell(self, work: str, error: BaseException) -> None:
        text = " ".join(str(error).split())[:500]
        try:
            self._store.compare_set(
                str(self._count), "", f"rank {self._rank}: {type(error).__name__}: {text}"
            )
        except RuntimeError:  # the store went with its host: there is nobody left to tell
            return

    def _reason(self, work: str) -> str:
        """What the first rank that failed has said."""
        deadline = time.monotonic() + PATIENCE_S
        try:
            while time.monotonic() < deadline:
                if self._store.check([str(self._count)]):
                    return f"{work} failed on {self._store.get(str(self._count)).decode()}"
                time.sleep(0.05)
        except RuntimeError:  # its host is gone
            pass
        return f"{work} failed: the connection to another rank was lost; see what that one printed last"


def _cause(error: BaseException) -> BaseException:
    """What the model raised: torch's pipeline stages wrap that in a page of their arguments."""
    if error.__cause__ is not None and "failed to run forward" in str(error):
        return error.__cause__
    return error


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether a rank or the network has gone, as the backends say it: gloo has no error type of its own."""
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__
    return False
