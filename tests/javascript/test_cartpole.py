"""The example's environment is Gymnasium's."""

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from tests.javascript.support import EXAMPLE, node

PHYSICS = Path(__file__).parent / "physics.mjs"
STEPS = 510


def balancing(state):
    """Actions that keep the pole up, of what Gymnasium's environment does."""
    return int(state[2] + state[3] > 0)


@pytest.fixture
def simulator():
    return gymnasium.make("CartPole-v1").unwrapped


@pytest.mark.parametrize("choose", [balancing, lambda _: 1], ids=["balancing", "falling"])
def test_same_actions_lead_to_the_same_states(simulator, choose):
    start = [0.03, -0.02, 0.01, 0.04]
    simulator.reset()
    simulator.state = np.array(start)
    actions, states, terminations = [], [], []
    while len(actions) < STEPS and not any(terminations):
        actions.append(choose(simulator.state))
        terminations.append(simulator.step(actions[-1])[2])
        states.append(simulator.state)

    steps = json.loads(
        node(PHYSICS, EXAMPLE / "cartpole.js", json.dumps(start), json.dumps(actions))
    )
    np.testing.assert_allclose([step["state"] for step in steps], states, rtol=0, atol=1e-6)
    assert [step["terminated"] for step in steps] == terminations
    assert [step["truncated"] for step in steps] == [n >= 500 for n in range(1, len(steps) + 1)]
    assert {step["reward"] for step in steps} == {1.0}
