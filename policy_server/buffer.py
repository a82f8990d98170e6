"""The bounded way of experience from the server's loop to ``sample()``.

One of the two seams between threads: the loop puts chunks in, the actor thread collects them.
Everything shared is guarded by one lock. Steps of running episodes stay with the loop, which only
tells how many there are.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal

from policy_server.experience import Chunk, EpisodeIdentity
from policy_server.ledger import Ledger

_CUT_WAIT_S = 1.0
"""How long ``collect`` waits for the loop to cut running episodes; a healthy loop needs 1 ms."""

_DISCARDED_PART = 0.125
"""Of the capacity, discarded at a time when the buffer is full."""

_REST_PART = 0.15
"""Of the steps that were asked for: what is left beyond them is handed over as well, up to here."""

_MAX_KEPT_ENDS = 1000
"""Chunks without steps, which only report an end, that are kept at least; at most twice as many.
They never make the buffer full, so this bounds it while no ``sample()`` comes."""


class _Demand:
    """What one ``collect`` call asks for."""

    __slots__ = ("flush", "met", "steps")

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.flush = False  # time is up: cut and hand over what is there
        self.met = False


class ExperienceBuffer:
    """Chunks waiting for ``sample()``, at most ``capacity_steps`` with those of running episodes.

    The actor thread loops over::

        chunks = buffer.collect(steps=4000, timeout_s=3.0, idle_timeout_s=0.1)

    and the loop, after each message::

        buffer.running_steps = steps_in_running_episodes
        if buffer.wants_cut():
            buffer.deliver_cut(cut_all_running_episodes())

    Attributes:
        ledger: Where every step went.
        complete_episodes: Running episodes are never cut (RLlib's ``batch_mode``).
        running_steps: Complete steps in running episodes. Loop thread only.
    """

    def __init__(
        self,
        capacity_steps: int,
        when_full: Literal["wait", "discard"] = "wait",
        *,
        complete_episodes: bool = False,
    ) -> None:
        self.ledger = Ledger()
        self.complete_episodes = complete_episodes
        self.running_steps = 0
        self._capacity = capacity_steps
        self._discards = when_full == "discard"
        self._changed = threading.Condition()
        self._chunks: deque[Chunk] = deque()
        self._buffered = 0
        self._stepless = 0  # chunks that only report an end
        self._sessions = 0
        self._demand: _Demand | None = None
        self._wake_loop: Callable[[], None] = lambda: None
        self._closed = False

    # Actor thread.

    def collect(self, steps: int, *, timeout_s: float, idle_timeout_s: float) -> list[Chunk]:
        """Wait for experience and take it, oldest first.

        Args:
            steps: Return as soon as that many can be had, cutting running episodes for it.
            timeout_s: Return what there is after this long.
            idle_timeout_s: The same while no client is connected.

        Returns:
            Chunks of about ``steps`` steps in all, never more than twice as many unless episodes
            must stay whole; in the ledger they are neither delivered nor discarded yet. Also chunks
            without steps, which only report an end.
        """
        begin = time.monotonic()
        demand = _Demand(max(1, steps))
        with self._changed:
            demand.met = self._buffered >= demand.steps
            self._demand = demand
        self._wake_loop()
        with self._changed:
            while not demand.met and not self._closed:
                limit = timeout_s if self._sessions else min(idle_timeout_s, timeout_s)
                left = begin + limit + (_CUT_WAIT_S if demand.flush else 0.0) - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                elif demand.flush or not self.running_steps:
                    break
                else:
                    demand.flush = True
                    self._wake_loop()
            taken = self._take(demand.steps)
            self._demand = None
        # There is room again, and in hold mode the gate is closed now.
        self._wake_loop()
        return taken

    def _take(self, steps: int) -> list[Chunk]:
        taken = []
        count = 0
        # Left to the next call, a small rest would be a version older, and a piece of its own of its
        # episodes, at whose end the learner has to bootstrap.
        if steps < self._buffered <= steps * (1.0 + _REST_PART):
            steps = self._buffered
        while self._chunks and (count < steps or not self._chunks[0].steps):
            chunk = self._chunks.popleft()
            if count + chunk.steps > 2 * steps and not self.complete_episodes:
                # One long chunk, a short fragment: the rest waits for the next call.
                chunk, rest = _split(chunk, steps - count)
                self._chunks.appendleft(rest)
            count += chunk.steps
            self._stepless -= not chunk.steps
            taken.append(chunk)
        self._buffered -= count
        return taken

    # Loop thread.

    def attach(self, wake_loop: Callable[[], None]) -> None:
        """Name what wakes the loop from another thread, after a demand or a hand-over."""
        self._wake_loop = wake_loop

    def connected(self, sessions: int) -> None:
        """Tell how many clients there are: with none, ``collect`` does not wait long."""
        with self._changed:
            self._sessions = sessions
            self._changed.notify_all()

    def put(self, chunks: Iterable[Chunk]) -> None:
        """Append chunks; meets a demand if they suffice. Drops the oldest if that is the rule."""
        with self._changed:
            self._append(chunks)
            demand = self._demand
            if demand is not None and self._buffered >= demand.steps:
                demand.met = True
                self._changed.notify_all()

    def deliver_cut(self, chunks: Iterable[Chunk]) -> None:
        """Append what was cut on demand; the demand is met with what there is now."""
        with self._changed:
            self._append(chunks)
            if self._demand is not None:
                self._demand.met = True
                self._changed.notify_all()

    def _append(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self._chunks.append(chunk)
            self._buffered += chunk.steps
            self._stepless += not chunk.steps
        if self._closed:
            self._drop(self._buffered, "shutdown")
        elif self._discards and self._buffered > self._capacity:
            # A good part at a time: each time costs a cut of all running episodes.
            part = int(self._capacity * _DISCARDED_PART)
            self._drop(max(self._buffered - self._capacity, part), "full")
        if self._stepless > 2 * _MAX_KEPT_ENDS:
            self._forget_ends(self._stepless - _MAX_KEPT_ENDS)

    def _forget_ends(self, surplus: int) -> None:
        kept: deque[Chunk] = deque()
        for chunk in self._chunks:
            if surplus and not chunk.steps:
                surplus -= 1
                self._stepless -= 1
            else:
                kept.append(chunk)
        self._chunks = kept

    def _drop(self, steps: int, reason: str) -> None:
        dropped = 0
        kept_ends = []
        while self._chunks and dropped < steps:
            chunk = self._chunks.popleft()
            if not self.complete_episodes and dropped + chunk.steps > steps:
                _drop_first(chunk, steps - dropped)
                self._chunks.appendleft(chunk)
                dropped = steps
                break
            dropped += chunk.steps
            self._stepless -= not chunk.steps
            chunk.settle()
            if chunk.end is not None:
                # Its return is still worth reporting; only the steps go.
                chunk.rows, chunk.rewards, chunk.logged = [], [], []
                kept_ends.append(chunk)
        self._chunks.extendleft(reversed(kept_ends))
        self._stepless += len(kept_ends)
        self._buffered -= dropped
        self.ledger.discard(reason, dropped)

    def withdraw(self, identity: EpisodeIdentity, reason: str) -> None:
        """Discard what waits here of one episode."""
        with self._changed:
            kept: deque[Chunk] = deque()
            withdrawn = 0
            for chunk in self._chunks:
                if chunk.identity is identity:
                    withdrawn += chunk.steps
                    self._stepless -= not chunk.steps
                    chunk.settle()
                else:
                    kept.append(chunk)
            self._chunks = kept
            self._buffered -= withdrawn
        self.ledger.discard(reason, withdrawn)

    def wants_cut(self) -> bool:
        """Whether running episodes should be cut now, to meet a demand or to make room."""
        if self.complete_episodes:
            return False
        demand = self._demand
        if demand is not None and not demand.met:
            return demand.flush or self._buffered + self.running_steps >= demand.steps
        return self._discards and self._buffered + self.running_steps > self._capacity

    def flushed_whole(self) -> bool:
        """Whether a demand ran out of time where running episodes may not be cut."""
        demand = self._demand
        return self.complete_episodes and demand is not None and demand.flush and not demand.met

    @property
    def wanted(self) -> bool:
        """Whether a ``collect`` call is waiting for more."""
        demand = self._demand
        return demand is not None and not demand.met

    def wanted_after(self, steps: int) -> bool:
        """Whether it will be, once that many more steps are running."""
        demand = self._demand
        if demand is None or demand.met or demand.flush:
            return False
        return self.complete_episodes or self._buffered + self.running_steps + steps < demand.steps

    @property
    def full(self) -> bool:
        """Whether further steps have to wait."""
        return self.full_after(0)

    def full_after(self, steps: int) -> bool:
        """Whether they will, once that many more steps are running."""
        if self._discards:
            return False
        # A running episode that may not be cut must be able to reach its end.
        running = 0 if self.complete_episodes else self.running_steps + steps
        return self._buffered + running >= self._capacity

    # Any thread.

    @property
    def held(self) -> int:
        """Steps received and neither delivered nor discarded, running episodes included."""
        with self._changed:
            return self._buffered + self.running_steps

    @property
    def capacity_steps(self) -> int:
        """How many steps fit in."""
        return self._capacity

    def close(self) -> None:
        """Discard what is left, now and from now on; releases a waiting ``collect``."""
        with self._changed:
            self._closed = True
            self._drop(self._buffered, "shutdown")
            self._changed.notify_all()


def _drop_first(chunk: Chunk, steps: int) -> None:
    chunk.rows = chunk.rows[steps:]
    chunk.rewards = chunk.rewards[steps:]
    chunk.logged = [index - steps for index in chunk.logged if index >= steps]
    chunk.first_step += steps


def _split(chunk: Chunk, steps: int) -> tuple[Chunk, Chunk]:
    """The first steps of a chunk, which then goes on, and the rest."""
    batch, row = chunk.rows[steps]
    first = dataclasses.replace(
        chunk,
        rows=chunk.rows[:steps],
        rewards=chunk.rewards[:steps],
        logged=[index for index in chunk.logged if index < steps],
        last_observation={
            path: column[row : row + 1] for path, column in batch.observations.items()
        },
        terminated=False,
        truncated=False,
        end=None,
        receipt=None,
    )
    _drop_first(chunk, steps)
    return first, chunk
