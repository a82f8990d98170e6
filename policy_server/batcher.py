"""Rows into batches: whatever waits when the engine is free is one inference.

Loop thread only. There is no timer: the first row of a loop iteration schedules a run for the end
of that iteration, and everything that arrived meanwhile goes along. Once all running episodes
wait there is nothing to wait for, and the run is at once; before anything is recorded, if there is but
one (``answer_first``).

Rows of training episodes pass a gate: in hold mode it is open while ``sample()`` wants experience,
and closed in either mode while the buffer is full. Asks that wait there are released by the next
demand, by room, or in hold mode once by a newer policy; else they time out and may be repeated.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client_sdk.wire.faults import Fault, Reason
from policy_server.actions import LOGP
from policy_server.buffer import ExperienceBuffer
from policy_server.episodes import EpisodeStore
from policy_server.experience import InferredBatch, Policy
from policy_server.faults import incidents
from policy_server.requests import Ask, Group, none_greedy

if TYPE_CHECKING:
    from policy_server.policy_store import PolicyStore
    from policy_server.tracks import AgentTrack

_RETRY_AFTER_S = 0.1
"""Told to clients that had to wait too long; they have waited already."""

_ONE_GREEDY = np.ones(1, np.bool_)
_ONE_GREEDY.setflags(write=False)


class Batcher:
    """Collects asks and runs the policy over them.

    Attributes:
        batches: Inferences so far.
        actions: Rows answered by them.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        policies: PolicyStore,
        buffer: ExperienceBuffer,
        store: EpisodeStore,
        *,
        hold: bool,
        hold_timeout_s: float,
        wait_timeout_s: float,
    ) -> None:
        self._loop = loop
        self._policies = policies
        self._buffer = buffer
        self._store = store
        self._hold = hold
        self._hold_timeout_s = hold_timeout_s
        self._wait_timeout_s = wait_timeout_s
        self._ready: list[Ask] = []
        self._ready_rows = 0
        self._gated: deque[Ask] = deque()
        self._unnoted: list[Group] = []  # answered, but their tracks do not know it
        self._scheduled = False
        self.batches = 0
        self.actions = 0

    def _must_hold(self, ask: Ask) -> bool:
        return self._hold and ask.gated and not self._buffer.wanted

    def _must_wait(self, ask: Ask) -> bool:
        return (ask.fills or (ask.gated and not self._hold)) and self._buffer.full

    @property
    def waiting(self) -> int:
        """Requests held at the gate."""
        return len(self._gated)

    def submit(self, ask: Ask) -> None:
        """Answer an ask as soon as may be. Its tracks are queued until then."""
        if (ask.gated and (self._hold or self._buffer.full)) or ask.fills:
            must_hold = self._must_hold(ask)
            if must_hold or self._must_wait(ask):
                timeout_s = self._hold_timeout_s if must_hold else self._wait_timeout_s
                ask.deadline_s = self._loop.time() + timeout_s
                self._gated.append(ask)
                return
        self._ready.append(ask)
        self._ready_rows += ask.size
        if self._ready_rows >= self._store.open_episodes:
            self._run()
        else:
            self._schedule()

    def answer_first(self, ask: Ask, row: Group, track: AgentTrack) -> bool:
        """Answer an ask's only row before it is recorded, if nobody else is there to wait for.

        Args:
            ask: Of that row alone.
            row: In order, and not recorded yet.
            track: Whose next step it is.

        Returns:
            Whether it was answered: record it then, and call ``recorded``. Else ``submit`` it.
        """
        policy, observations = self._policies.current, row.observations
        if policy is None or observations is None or self._ready or self._gated:
            return False
        if self._store.open_episodes > 1 or (track.training and self._closes_after(1)):
            return False
        greedy = track.episode.options.greedy
        try:
            batch = policy.infer(observations, _ONE_GREEDY if greedy else none_greedy(1), (track,))
        except Exception:  # it is tried again, and told, on the usual way
            return False
        row.batch, row.whole = batch, True
        if not _is_finite(batch):  # told on the usual way, too
            return False
        row.asked, row.tracks = observations, [track]
        self.batches += 1
        self.actions += 1
        ask.add(row)
        ask.arrived(1)
        return True

    def _closes_after(self, steps: int) -> bool:
        """Whether the gate will be closed once that many more steps are recorded."""
        if self._hold:
            return not self._buffer.wanted_after(steps)
        return self._buffer.full_after(steps)

    def recorded(self, row: Group) -> None:
        """A row that was answered first is recorded now."""
        self._unnoted.append(row)
        self.note()

    def open_gate(self) -> None:
        """Something changed: let waiting asks through if they may."""
        self._let_through(
            [ask for ask in self._gated if not (self._must_hold(ask) or self._must_wait(ask))]
        )

    def policy_arrived(self) -> None:
        """A newer policy is there: held asks get one action each under it."""
        if self._hold:
            self._let_through([ask for ask in self._gated if not self._must_wait(ask)])

    def _let_through(self, asks: list[Ask]) -> None:
        if not asks:
            return
        if len(asks) == len(self._gated):
            self._gated.clear()
        else:
            for ask in asks:
                self._gated.remove(ask)
        self._ready.extend(asks)
        self._ready_rows += sum(ask.size for ask in asks)
        self._schedule()

    def expire(self) -> None:
        """Give up asks that have waited too long; their rows stay and may be asked again."""
        now = self._loop.time()
        for ask in [ask for ask in self._gated if ask.deadline_s <= now]:
            self._gated.remove(ask)
            if self._must_hold(ask):
                fault = Fault(
                    Reason.NOT_READY,
                    "actions are held back while RLlib learns; ask again",
                    retry_after_s=_RETRY_AFTER_S,
                )
            else:
                fault = Fault(
                    Reason.LIMIT_EXCEEDED,
                    f"the experience buffer is full ({self._buffer.capacity_steps} steps, "
                    f"buffer_fragments) and there was no room within wait_timeout_s="
                    f"{self._wait_timeout_s:g}; ask again, or set when_full='discard'",
                    retry_after_s=_RETRY_AFTER_S,
                )
            self._give_up(ask, fault)

    def cancel(self, fault: Fault) -> None:
        """Answer all that waits with an error."""
        asks = [*self._gated, *self._ready]
        self._gated.clear()
        self._ready.clear()
        self._ready_rows = 0
        for ask in asks:
            self._give_up(ask, fault)

    def withdraw(self, ask: Ask) -> None:
        """The client went away: its rows stay, but nobody waits for the answer."""
        if ask.finished:
            return
        ask.part()  # else a row that is held would keep it, and its columns, as long
        try:
            self._gated.remove(ask)
        except ValueError:
            return
        fault = Fault(
            Reason.NOT_READY,
            "the call that asked for this action first was cancelled; ask again",
            retry_after_s=_RETRY_AFTER_S,
        )
        self._give_up(ask, fault)

    def _give_up(self, ask: Ask, fault: Fault) -> None:
        for group in ask.asked:
            for track in group.tracks:
                track.queued = False
                waiters, track.waiters = track.waiters, []
                for waiter in waiters:
                    waiter(fault)
        ask.finish(fault)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run_scheduled)

    def _run_scheduled(self) -> None:
        self._scheduled = False
        if self._ready:
            self._run()

    def _run(self) -> None:
        asks, self._ready = self._ready, []
        self._ready_rows = 0
        policy = self._policies.current
        if policy is None:
            fault = Fault(
                Reason.NOT_READY,
                "no policy yet: RLlib has not sent its first weights; ask again",
                retry_after_s=_RETRY_AFTER_S,
            )
            for ask in asks:
                self._give_up(ask, fault)
            return
        # One policy for the whole run: no batch mixes two versions.
        asked = [group for ask in asks for group in ask.asked if group.substitute is None]
        failures: dict[int, Fault] = {}
        try:
            if asked:
                self._infer(policy, asked)
        except Exception:  # whose fault it is shows when each request goes alone
            for group in asked:
                self._infer_alone(policy, group, failures)
        for ask in asks:
            for group in ask.asked:
                if group.substitute is not None:
                    self._infer_alone(policy, group, failures)
        for ask in asks:
            if failures and (mine := [group for group in ask.asked if id(group) in failures]):
                self._give_up(ask, failures[id(mine[0])])
            else:
                ask.arrived(ask.size)

    def _infer_alone(self, policy: Policy, group: Group, failures: dict[int, Fault]) -> None:
        try:
            self._infer(policy, [group])
        except Exception as error:  # a bug of module or connectors must not end the loop
            failures[id(group)] = incidents.record("inference failed", error)

    def _infer(self, policy: Policy, parts: Sequence[Group]) -> None:
        if len(parts) == 1:
            (only,) = parts
            only.whole = True
            # Not once more: it was inferred first, and something is wrong with the answer.
            batch = only.batch or policy.infer(only.asked, only.greedy, only.tracks)
            if only.substitute is not None:
                batch = only.substitute(batch)
        else:
            tracks = [track for part in parts for track in part.tracks]
            greedy = (
                np.concatenate([part.greedy for part in parts])
                if any(part.any_greedy for part in parts)
                else none_greedy(len(tracks))
            )
            batch = policy.infer(
                {
                    path: np.concatenate([part.asked[path] for part in parts])
                    for path in parts[0].asked
                },
                greedy,
                tracks,
            )
        if not _is_finite(batch):
            self._abandon_not_finite(parts, batch.outputs[LOGP])
        row = 0
        for part in parts:
            part.batch, part.start = batch, row
            row += len(part.tracks)
        self.batches += 1
        self.actions += row
        # In the loop's next iteration the answers are on their way, and there is time.
        if not self._unnoted:
            self._loop.call_soon(self.note)
        self._unnoted.extend(parts)

    def note(self) -> None:
        """See that the tracks know their latest answers; before anything more is recorded of them.

        Until then their rows are what they were: queued. Repeats that wait for them are answered now.
        """
        parts, self._unnoted = self._unnoted, []
        for part in parts:
            batch = part.batch
            if batch is None:  # whatever was inferred has one
                continue
            chosen_by = batch.policy
            logged = part.substitute is not None
            for row, track in enumerate(part.tracks, part.start):
                if not track.queued:  # abandoned or given up
                    continue
                if track.rewards and track.rows[0][0].policy is not chosen_by:
                    self._store.cut(track)
                track.awaiting = None
                track.queued = False
                track.last = answer = (batch, row)
                if logged:
                    track.logged = answer
                    if track.training:
                        track.logged_steps.append(len(track.rows))
                if track.training:
                    track.rows.append(answer)
                if track.waiters:
                    waiters, track.waiters = track.waiters, []
                    for waiter in waiters:
                        waiter(None)

    def _abandon_not_finite(self, parts: Sequence[Group], logp: NDArray[Any]) -> None:
        """An observation that overflows in the policy would turn all of its weights into NaN."""
        start = 0
        for part in parts:
            size = len(part.tracks)
            for index in np.flatnonzero(~np.isfinite(logp[start : start + size])).tolist():
                track = part.tracks[index]
                fault = Fault(
                    Reason.NOT_FINITE,
                    "the policy's answer to this observation is not finite; the episode is "
                    "abandoned. Check the simulator, or scale what it observes",
                )
                part.refuse(index, fault)
                track.queued = False
                waiters, track.waiters = track.waiters, []
                for waiter in waiters:
                    waiter(fault)
                self._store.abandon(track)
            start += size


def _is_finite(batch: InferredBatch) -> bool:
    logp = batch.outputs.get(LOGP)
    return logp is None or math.isfinite(sum(logp.tolist()))
