"""Where the newest policy is: one of the two seams between RLlib's thread and the server's loop.

The actor thread publishes, the loop reads ``current`` once per batch: one reference is swapped,
and whoever took the old policy finishes with it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from policy_server.experience import Policy

_logger = logging.getLogger(__name__)


class PolicyStore:
    """The newest policy and who wants to hear of it; safe to use from any thread.

    ::

    store.publish(factory.build(version, env_steps, view))   # actor thread
    policy = store.current                                   # loop thread, once per batch
    """

    def __init__(self) -> None:
        # Taken by writers only: a reader sees the old reference or the new one, both whole.
        self._lock = threading.Lock()
        self._current: Policy | None = None
        self._subscribers: list[Callable[[Policy], None]] = []

    @property
    def current(self) -> Policy | None:
        """The newest policy; None until the first one is published."""
        return self._current

    def publish(self, policy: Policy) -> None:
        """Put a policy in the place of the current one, then tell the subscribers.

        Args:
            policy: From now on immutable and shared by all threads.
        """
        with self._lock:
            self._current = policy
            subscribers = tuple(self._subscribers)
        for callback in subscribers:
            try:
                callback(policy)
            except Exception:
                # Policies go on: a subscriber's trouble is not the learner's.
                _logger.exception("a subscriber failed on policy version %d", policy.version)

    def subscribe(self, callback: Callable[[Policy], None]) -> Callable[[], None]:
        """Have each policy reported from now on.

        Args:
            callback: Called with the policy, on the publishing thread, after each swap; must be
                quick. What it raises is logged and stays without effect.

        Returns:
            A function that ends the subscription; calling it twice is fine.
        """
        with self._lock:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

        return unsubscribe
