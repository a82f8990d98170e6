"""The ledger as RLlib's results show it, while clients die."""

from __future__ import annotations

import contextlib
import random

import pytest
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from tests.runner.support import ppo_config, running
from tests.server.talk import eventually, program
from tests.server.test_ledger import CLIENT
from tests.servers import CARTPOLE_OBSERVATIONS


class Results:
    """What RLlib makes of the metrics of one runner."""

    def __init__(self):
        self.logger = MetricsLogger(root=True)

    def ledger(self, runner):
        """As of now; None where there was nothing to report."""
        metrics = runner.get_metrics()
        if not metrics:
            return None
        self.logger.aggregate([metrics])
        return self.logger.peek("policy_server")["ledger"]


def is_even(ledger):
    return ledger["received"] == sum(ledger.values()) - ledger["received"]


@pytest.mark.parametrize("when_full", ["wait", "discard"])
def test_exported_ledger_is_even_whoever_is_killed_meanwhile(when_full):
    luck = random.Random(5)
    config = ppo_config({"while_learning": "serve", "lease_s": 1.0, "when_full": when_full})
    config.environment(observation_space=CARTPOLE_OBSERVATIONS)
    ledgers, sampled, results = [], 0, Results()
    with running(config) as runner, contextlib.ExitStack() as stack:
        clients = []
        for name in range(3):
            clients.append(stack.enter_context(program(CLIENT, runner.address, name)))
            stack.callback(clients[-1].kill)
        eventually(lambda: runner._server.sessions == 3, within_s=30)
        version = 0

        def sample():
            nonlocal sampled
            sampled += sum(map(len, runner.sample()))
            ledger = results.ledger(runner)
            if ledger is not None:
                assert is_even(ledger), ledger
                ledgers.append(ledger)

        while clients:
            target = sampled + 400
            while sampled < target:
                sample()
                if luck.random() < 0.7:  # else two fragments under the same weights
                    version += luck.randrange(1, 4)  # some of what waits has become too old
                    runner.set_state(
                        {"rl_module": runner.module.get_state(), "weights_seq_no": version}
                    )
            clients.pop(luck.randrange(len(clients))).kill()
        eventually(lambda: runner._server.sessions == 0, within_s=10)
        while runner._server.ledger()["held"]:
            sample()
        runner.stop()
        last = {**runner._buffer.ledger.snapshot(), "held": runner._buffer.held}
    assert len(ledgers) >= 20
    assert ledgers[-1]["received"] >= 1200
    assert any(ledger["held"] for ledger in ledgers)
    assert is_even(last)
    assert last["held"] == 0
    assert last["delivered"] == sampled
    assert last["discarded_stale"] > 0
    assert [ledger["received"] for ledger in ledgers] == sorted(
        ledger["received"] for ledger in ledgers
    )
