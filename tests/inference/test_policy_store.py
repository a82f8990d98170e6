"""The policy store hands the newest policy from the publishing thread to everyone else."""

from __future__ import annotations

import types
from typing import Any, cast

import pytest

from policy_server.experience import Policy
from policy_server.policy_store import PolicyStore


def policy(version: int) -> Policy:
    return cast("Policy", types.SimpleNamespace(version=version))


def test_there_is_no_policy_before_the_first_is_published() -> None:
    assert PolicyStore().current is None


def test_the_policy_published_last_is_the_current_one() -> None:
    store = PolicyStore()
    first, second = policy(1), policy(2)
    store.publish(first)
    assert store.current is first
    store.publish(second)
    assert store.current is second


def test_a_subscriber_hears_of_a_policy_that_is_already_current() -> None:
    store = PolicyStore()
    seen: list[tuple[Any, Any]] = []
    store.subscribe(lambda published: seen.append((published, store.current)))
    new = policy(3)
    store.publish(new)
    assert seen == [(new, new)]


def test_a_subscription_can_be_ended_twice() -> None:
    store = PolicyStore()
    seen: list[Policy] = []
    unsubscribe = store.subscribe(seen.append)
    unsubscribe()
    unsubscribe()
    store.publish(policy(1))
    assert seen == []


def test_a_failing_subscriber_harms_neither_publisher_nor_neighbour(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = PolicyStore()
    seen: list[Policy] = []

    def fail(_: Policy) -> None:
        raise RuntimeError("no")

    store.subscribe(fail)
    store.subscribe(seen.append)
    store.publish(policy(7))
    assert [each.version for each in seen] == [7]
    assert "policy version 7" in caplog.text
