"""Small collectives in host memory, for planning and checks, and bytes for any rank.

All messages go between ranks that `parallel.routes` connects: whatever the number of ranks, none has more
than a few dozen connections or messages at a time, and nothing takes more than a few hops.
"""

from __future__ import annotations

import atexit
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
import torch._C._distributed_c10d as distributed
import torch.distributed as dist

from parallel.arrivals import Arrivals
from parallel.gloo_calls import Call, let_gloo_finish_at_exit, let_go, serve
from parallel.liveness import PATIENCE, Liveness, tell
from parallel.parcels import Bytes, Parcel, as_array, bundle, framed, unbundled, unframed
from parallel.routes import Routes
from parallel.store_calls import Connection, SilentStoreError, StoreCalls, connection_to, within

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Longest wait for ranks that are alive, which includes the slowest rank's write of a checkpoint."""

CLOSING_S = 5.0
"""Longest wait, at exit, for connections that are being closed."""

SLOT_BYTES = 1 << 10
"""Size of a message that is sent along with its length."""


class LostRankError(RuntimeError):
    """Another rank has ended or failed, or doesn't answer."""


class HostComm:
    """Collectives of Python values and bytes between the CPUs of all ranks.

    It has connections of its own, so it can be used from any one thread without disturbing training's
    collectives. It outlives `destroy_process_group`, so that background work can finish.

    If a rank fails inside a call, or ends, or gives no sign of life for `patience` seconds, the call raises
    LostRankError on all others, with the same words, as does every later call.

    Attributes:
        doing: name of the work at hand, for messages.
        store: these ranks' own part of the rendezvous store.
        connection: the process's connection to the whole store.
        part: prefix of `store` in it; None if the ranks met in a process group.
    """

    doing = ""
    connection: Connection
    part: str | None = None

    def __init__(self, beside: HostComm | None = None) -> None:
        """Connect the ranks of the default process group. Collective.

        Those that have connections already, `beside`, are known to be lost if they are before they come here.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        patience = PATIENCE if beside is None or size == 1 else beside.patience

        def part() -> Any:
            if beside is None:
                self.connection = connection_to(dist.distributed_c10d._get_default_store())
            else:
                self.connection = beside.connection
            store = self.connection.clone if beside is None else beside.store
            return part_of(store, "uni3d/host_comm", rank)

        self._connect(within(patience, part), rank, size, patience, beside=beside)

    @classmethod
    def of(
        cls,
        store: Any,
        rank: int,
        size: int,
        *,
        doing: str = "",
        patience: float = PATIENCE,
        timeout: timedelta = TIMEOUT,
    ) -> HostComm:
        """Connect ranks that meet at a `torch.distributed.Store`, without a process group. Collective.

        They may come to a store that other ranks, which have ended, have used before.

        Raises:
            LostRankError: a rank didn't come within `timeout`, or was lost; begins with `doing`.
        """
        comm = cls.__new__(cls)
        comm.doing, seconds = doing, timeout.total_seconds()
        comm.connection = within(patience, lambda: connection_to(store))
        arrivals = Arrivals(comm.connection.clone, rank, patience)
        part = arrivals.part(seconds)
        if part is None:
            raise LostRankError(f"{comm._work}rank 0 didn't come within {seconds:g} s, or has ended")
        answer = arrivals.answer if rank == 0 else None
        comm.part = arrivals.name
        comm._connect(part, rank, size, patience, timeout, answer=answer)
        if rank == 0:
            arrivals.settle()
        return comm

    @classmethod
    def meeting(cls, name: str, rank: int, size: int) -> HostComm:
        """Connect `size` ranks of the default process group that meet under a name of their own. Collective.

        It may run in any thread: it waits on a connection to the store that is its own, so that nothing else
        of the process has to wait for it. `leave` is to be called after the last collective.
        """
        store: Any = dist.distributed_c10d._get_default_store()
        meeting = distributed.PrefixStore(name, store.clone())
        comm = cls.__new__(cls)
        comm._connect(meeting, rank, size)
        comm._met = meeting
        return comm

    def _connect(
        self,
        store: Any,
        rank: int,
        size: int,
        patience: float = PATIENCE,
        timeout: timedelta = TIMEOUT,
        beside: HostComm | None = None,
        answer: Callable[[], None] | None = None,
    ) -> None:
        self.rank, self.size, self._routes = rank, size, Routes(rank, size)
        self._lost, self.store = "", store
        self._met: Any = None
        try:
            self._meet(patience, timeout, beside, answer)
        except (LostRankError, SilentStoreError):
            raise
        except BaseException as error:  # an interrupt too, as the others wait for this rank
            if size > 1:
                tell(StoreCalls(store, patience), self._failure(error))
            raise

    def _meet(
        self,
        patience: float,
        timeout: timedelta,
        beside: HostComm | None,
        answer: Callable[[], None] | None,
    ) -> None:
        store, rank, size = self.store, self.rank, self.size
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = TIMEOUT
        # Ranks connect when they first talk: a rank has a few connections, not one to each of thousands.
        options._devices = [dist.ProcessGroupGloo.create_default_device(lazy_init=True)]
        self._group: Any = within(patience, lambda: dist.ProcessGroupGloo(store, rank, size, options))
        # The same on all ranks: the number of works begun, and those that haven't ended.
        self._works, self._open = 0, list[int]()
        self._waits_for: int | None = None
        if size > 1:
            let_gloo_finish_at_exit()
            self._life = Liveness(store, rank, size, patience, None if beside is None else beside.life)
            self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
            # Gloo's waits can't be interrupted: they are a thread's, which is left behind if a rank is gone.
            Thread(target=serve, args=(self._calls,), name="uni3d's connections", daemon=True).start()
            self._end = weakref.finalize(self, self._calls.put, None)
            works = () if beside is None else beside._open
            peers, seconds = self._routes.all_peers, timeout.total_seconds()
            if reason := self._life.come(peers, seconds, works, answer):
                self._lost = self._life.tell(f"{self._work}{reason}")
                self._group = None  # so that ranks that have connected notice
        # Now, while all are alive: one that has died since is noticed at once, but not while connecting.
        self.exchange({})

    @property
    def patience(self) -> float:
        """Seconds without a sign of life after which a rank counts as gone."""
        return self._life.patience if self.size > 1 else 0.0

    @patience.setter
    def patience(self, seconds: float) -> None:
        if self.size > 1:
            self._life.patience = seconds

    @property
    def life(self) -> Liveness | None:
        """Signs of life of these ranks; None for a single rank."""
        return self._life if self.size > 1 else None

    @contextmanager
    def at(self, work: str, *, alike: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Name the work that the calls in the block belong to, for messages.

        If a rank leaves the block by an error, the calls of the others that wait for it raise LostRankError.
        Errors of the types `alike` are those that all ranks raise, so they aren't told.
        """
        self._works += 1
        number, before, self.doing = self._works, self.doing, work
        self._open.append(number)
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not isinstance(error, (LostRankError, *alike)):
                self._life.tell(self._failure(error), number)
            raise
        finally:
            self.doing = before
            self._open.remove(number)

    def leave(self) -> None:
        """Close the connections, and remove what this rank wrote into the store of `meeting`. Local."""
        self._lost, self._group = self._lost or "this rank has left", None
        if self.size > 1:
            self._end()
            self._life.end()
        if self._met is not None:
            with suppress(RuntimeError):  # the store may have ended with its process
                self._met.delete_key(f"0/{self.rank}")  # as gloo names it; under another name it only stays

    def all_reduce(self, value: T, merge: Callable[[list[T]], T]) -> T:
        """Return all ranks' values merged, on every rank.

        `merge` gets values of adjacent ranks in their order, some of them merged before. It mustn't fail.
        """
        return self._done(  # type: ignore[no-any-return]
            lambda: pickle.loads(
                self._down(self._up(pickle.dumps(value), lambda parts: _merged(parts, merge)))
            )
        )

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, on rank 0; an empty list on the others."""
        whole = self._done(lambda: self._up(framed(pickle.dumps(value)), b"".join))
        return [pickle.loads(part) for part in unframed(whole)] if self.rank == 0 else []

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        whole = self._done(lambda: self._down(pickle.dumps(value) if self.rank == 0 else b""))
        return pickle.loads(whole)  # type: ignore[no-any-return]

    def exchange(self, outgoing: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """Send `outgoing[r]` to rank r; return the bytes from each rank that sent some here, by rank."""
        parcels = [Parcel(self.rank, target, data) for target, data in outgoing.items()]
        held = self._done(lambda: self._carried(parcels))
        return {parcel.source: parcel.data for parcel in sorted(held, key=lambda parcel: parcel.source)}

    def _carried(self, held: list[Parcel]) -> list[Parcel]:
        """Send parcels on their way, and those of others, hop by hop; return the ones for this rank."""
        for hop, peers in enumerate(self._routes.peers):
            onward: dict[int, list[Parcel]] = defaultdict(list)
            for parcel in held:
                onward[self._routes.after(hop, parcel.source, parcel.target)].append(parcel)
            held = onward.pop(self.rank, [])
            bundles = {peer: bundle(onward.pop(peer, [])) for peer in peers}
            assert not onward, f"no way from rank {self.rank} to {[*onward]}"
            for arrived in self._swap(bundles, peers).values():
                held += unbundled(arrived)
        return held

    def _up(self, data: bytes, merge: Callable[[list[bytes]], bytes]) -> bytes:
        """Merge the ranks' bytes along the tree; return the whole on rank 0."""
        arrived = self._swap({}, self._routes.children)
        merged = merge([data, *(part.tobytes() for part in arrived.values())])
        if self.rank != 0:
            self._swap({self._routes.parent: as_array(merged)}, ())
        return merged

    def _down(self, data: bytes) -> bytes:
        """Return rank 0's bytes."""
        if self.rank != 0:
            data = self._swap({}, [self._routes.parent])[self._routes.parent].tobytes()
        # The farthest first, as they have others to tell.
        self._swap(dict.fromkeys(reversed(self._routes.children), as_array(data)), ())
        return data

    def _done(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which waits for other ranks; close the connections if it fails."""
        if self._lost:
            raise LostRankError(self._lost)
        if self.size == 1:
            return work()
        call = Call(work)
        self._calls.put(call)
        try:
            while not call.ended.wait(self._life.interval):
                if reason := self._life.reason(self._open) or self._given_up():
                    raise LostRankError(self._life.tell(reason))
            return call.result()  # type: ignore[no-any-return]
        except BaseException as error:
            if not isinstance(error, LostRankError):
                self._life.tell(self._failure(error))
            self._lost = str(error) or type(error).__name__
            # In a thread, since gloo sometimes waits forever for its own. The connections then end with the
            # process; the others look for the reason meanwhile.
            group, self._group = [self._group], None
            closing = Thread(target=let_go, args=(group, call.ended, error, self._waits_for), daemon=True)
            closing.start()
            # A thread that wakes up in gloo while the interpreter exits aborts the process.
            atexit.register(closing.join, CLOSING_S)
            raise

    def _given_up(self) -> str | None:
        """Return why this rank waits no longer, once the one that it waits for counts as gone."""
        lost = None if self._waits_for is None else self._life.lost(self._waits_for)
        return lost and self._life.tell(f"{self._work}{lost}")

    def _failure(self, error: BaseException) -> str:
        """Return what this rank tells the others of its error."""
        return f"{self._work}rank {self.rank} failed: {type(error).__name__}: {error}"[:500]

    @property
    def _work(self) -> str:
        return f"{self.doing}: " if self.doing else ""

    def _swap(self, outgoing: Mapping[int, Bytes], sources: Iterable[int]) -> dict[int, Bytes]:
        """Send each of these peers its bytes, and return the bytes from each of `sources`."""
        sending, receiving, found = [], [], {}
        for peer, data in outgoing.items():
            head = np.zeros(8 + SLOT_BYTES, np.uint8)
            head[:8] = np.frombuffer(data.nbytes.to_bytes(8, "little"), np.uint8)
            head[8 : 8 + data.nbytes] = data[:SLOT_BYTES]
            for part in [head, data[SLOT_BYTES:]] if data.nbytes > SLOT_BYTES else [head]:
                sending.append(self._begun(self._group.send, part, peer))
        for peer in sources:
            found[peer] = np.empty(8 + SLOT_BYTES, np.uint8)
            receiving.append(self._begun(self._group.recv, found[peer], peer))
        self._wait(receiving)
        further = []
        for peer, head in found.items():
            length = int.from_bytes(head[:8].tobytes(), "little")
            found[peer] = head[8 : 8 + length]
            if length > SLOT_BYTES:
                found[peer] = np.empty(length, np.uint8)
                found[peer][:SLOT_BYTES] = head[8:]
                further.append(self._begun(self._group.recv, found[peer][SLOT_BYTES:], peer))
        self._wait(further)
        self._wait(sending)  # last, as sending ends when the peer receives
        return found

    def _begun(self, call: Callable[..., Any], memory: Bytes, peer: int) -> tuple[int, Any]:
        self._waits_for = peer  # to connect, the first time
        try:
            return peer, call([torch.from_numpy(memory)], peer, 0)
        except RuntimeError as error:
            raise self._without(peer, error) from error
        finally:
            self._waits_for = None

    def _wait(self, works: Iterable[tuple[int, Any]]) -> None:
        for peer, work in works:
            self._waits_for = peer
            try:
                work.wait()
            except RuntimeError as error:
                raise self._without(peer, error) from error
            finally:
                self._waits_for = None

    def _without(self, peer: int, error: RuntimeError) -> LostRankError:
        why = str(error).partition(" This is typically")[0]  # the rest is general advice
        what = f"rank {peer} has ended, or its connection to rank {self.rank}; its own last output says why"
        if "Timed out" in why:
            what = f"rank {self.rank} has waited {TIMEOUT} for rank {peer}, which is alive but busy"
        return LostRankError(self._life.tell(f"{self._work}{what} ({why})"))


def part_of(store: Any, name: str, rank: int) -> Any:
    """Return a part of a store that nothing else uses. Ranks ask for those of a name in the same order."""
    return distributed.PrefixStore(f"{name}/{store.add(f'{name}/{rank}', 1)}", store)


def _merged(parts: list[bytes], merge: Callable[[list[T]], T]) -> bytes:
    # Bytes of our own ranks, never of a file.
    return pickle.dumps(merge([pickle.loads(part) for part in parts])) if len(parts) > 1 else parts[0]
