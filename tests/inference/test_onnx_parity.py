"""The graphs compute what RLlib's own modules and connectors compute, for every supported kind."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
import onnx
import pytest
import torch
from kinds import (
    BOX,
    MODULES,
    NESTED,
    Box,
    Discrete,
    MultiDiscrete,
    both,
    built_as,
    c51,
    ppo,
    sac,
)
from modules import CARTPOLE, Built, build, contexts, flags
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.dqn.default_dqn_rl_module import QF_PREDS
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.core.distribution.torch.torch_distribution import TorchSquashedGaussian
from ray.rllib.utils.spaces.space_utils import unsquash_action
from scipy import stats
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from client_sdk.noise_pool import NoisePool
from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.wire.batches import SpaceCodec
from policy_server.onnx_engine.check import module_inputs, probe
from policy_server.onnx_engine.factory import OnnxEnginePolicy
from policy_server.onnx_engine.operators import PORTABLE_OPERATORS


@pytest.mark.parametrize("name", MODULES)
def test_a_graph_stays_within_what_game_engines_run(name: str) -> None:
    model = onnx.load_from_string(built_as(name)[1].model)
    assert model.ir_version == 8
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 15)]
    assert {node.op_type for node in model.graph.node} <= PORTABLE_OPERATORS
    for value in [*model.graph.input, *model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        assert [bool(dim.dim_param) for dim in dims] == [True] + [False] * (len(dims) - 1)
    onnx.checker.check_model(model, full_check=True)


def test_portable_operators_draw_nothing_loop_nowhere_and_remember_nothing() -> None:
    own_numbers = {each for each in PORTABLE_OPERATORS if "Random" in each}
    stateful = {"Bernoulli", "Multinomial", "If", "Loop", "Scan", "LSTM", "GRU", "RNN"}
    assert not own_numbers | stateful & PORTABLE_OPERATORS


@pytest.mark.parametrize("name", MODULES)
def test_a_graph_gives_what_the_module_gives_on_1000_observations(name: str) -> None:
    built, graph, module = built_as(name)
    policy = OnnxPolicy(graph.model)
    distribution = policy.spec.distribution
    n = 1000
    observations = probe(SpaceCodec(built.observation_space), n, np.random.default_rng(6))
    found = outputs_of(policy, observations, flags(n, greedy=True))
    wanted = module.infer(observations, flags(n, greedy=True), contexts(n))
    inputs = inputs_under(module, built, observations)
    role = "q_values" if distribution == "epsilon_greedy" else "action_dist_inputs"
    close(found[role], inputs.numpy(), 1e-5)

    actions, env_actions = wanted.actions[""], wanted.env_actions[""]
    if distribution == "squashed_gaussian":
        # RLlib's own is the mean as it comes.
        actions = np.tanh(actions)
        executed = actions if "raw" in name else unsquash_action(actions, built.action_space)
        env_actions = executed.astype(env_actions.dtype)
    clear = rows_without_ties(built.action_space, inputs)
    assert clear.mean() > 0.9
    for ours, rllibs in ((found["actions"], actions), (found["env_actions"], env_actions)):
        assert ours.dtype == rllibs.dtype
        assert ours.shape == rllibs.shape
        close(ours[clear], rllibs[clear], 1e-5)

    noise = NoisePool(policy.spec.noise, np.random.default_rng(7)).take(flags(n, greedy=False))
    sampled = outputs_of(policy, observations, flags(n, greedy=False), noise)
    if distribution != "epsilon_greedy":
        expected = log_densities(built.module, distribution, sampled, noise)
        np.testing.assert_allclose(sampled["action_logp"], expected, rtol=0, atol=1e-4)
    for row in range(0, n, 50):
        value = SpaceCodec(built.action_space).value({"": sampled["env_actions"]}, row)
        if name != "PPO to raw Box":
            assert built.action_space.contains(value)


@pytest.mark.parametrize("name", MODULES)
def test_a_policy_bound_to_memory_acts_as_it_does_unbound(name: str) -> None:
    built, graph, _ = built_as(name)
    pools = [NoisePool(graph.onnx.noise.spec, np.random.default_rng(8)) for _ in range(2)]
    unbound, bound = (OnnxPolicy(graph.model, pool) for pool in pools)
    for n in (1, 5):
        in_place = bound.bind(n)
        pools[0].take(flags(n, greedy=True))  # as binding did
        for seed, greedy in enumerate((flags(n, greedy=False), np.arange(n) % 2 == 0)):
            rows = probe(SpaceCodec(built.observation_space), n, np.random.default_rng(seed))
            wanted, found = unbound.act(rows, greedy), in_place.act(rows, greedy)
            for columns, others in zip(wanted, found, strict=True):
                assert columns.keys() == others.keys()
                for key, column in columns.items():
                    assert column.dtype == others[key].dtype
                    np.testing.assert_array_equal(column, others[key])


@pytest.mark.parametrize("name", ["PPO Box to Discrete", "PPO to Box"])
@pytest.mark.parametrize("n", [1, 5])
def test_a_batch_stays_what_it_was_however_many_of_its_size_follow(name: str, n: int) -> None:
    built, graph, _ = built_as(name)
    rows = [
        probe(SpaceCodec(built.observation_space), n, np.random.default_rng(i)) for i in range(40)
    ]
    greedy = flags(n, greedy=True)
    batches = [graph.infer(each, greedy, contexts(n)) for each in rows]
    for each, batch in zip(rows, batches, strict=True):
        actions, env_actions, outputs = graph.onnx.act(each, greedy)
        for found, wanted in (
            (batch.observations, each),
            (batch.actions, actions),
            (batch.env_actions, env_actions),
            (batch.outputs, outputs),
        ):
            assert found.keys() == wanted.keys()
            for key, column in wanted.items():
                np.testing.assert_array_equal(found[key], column)


def outputs_of(
    policy: OnnxPolicy, observations: Any, greedy: Any, noise: Any = None
) -> dict[str, Any]:
    """Everything that a graph gives, by role."""
    roles = tuple(policy.spec.roles)
    if noise is None:
        noise = NoisePool(policy.spec.noise).take(greedy)
    return dict(zip(roles, policy.run(observations, noise, roles), strict=True))


def log_densities(module: Any, distribution: str, sampled: dict[str, Any], noise: Any) -> Any:
    """Of sampled actions: RLlib's, but SAC's by torch from the values before the tangent."""
    inputs = torch.from_numpy(sampled["action_dist_inputs"])
    if distribution != "squashed_gaussian":
        rllibs = module.get_exploration_action_dist_cls().from_logits(inputs)
        return rllibs.logp(torch.from_numpy(sampled["actions"])).numpy()
    mean, log_std = inputs.to(torch.float64).chunk(2, dim=-1)
    normal = Normal(mean, log_std.clamp(-5, 2).exp(), validate_args=False)
    # What the transform has made of a value it takes back without rounding.
    tangent = TanhTransform(cache_size=1)
    squashed = tangent(normal.mean + normal.stddev * torch.from_numpy(noise))
    density = TransformedDistribution(normal, [tangent], validate_args=False)
    return density.log_prob(squashed).sum(dim=-1).numpy()


def test_the_learner_gets_no_outputs_that_it_does_not_ask_for() -> None:
    """Replay buffers would keep them, step by step."""
    wanted = {"PPO Box to Discrete": {"action_logp", "action_dist_inputs"}, "DQN": set()}
    for name, outputs in (wanted | {"C51": set(), "SAC": set()}).items():
        _, graph, _ = built_as(name)
        rows = {"": np.zeros((2, 4), np.float32)}
        assert set(graph.infer(rows, flags(2, greedy=False), contexts(2)).outputs) == outputs


def test_sacs_log_densities_are_rllibs_where_rllibs_are_exact() -> None:
    graph, _ = both(build(sac(), CARTPOLE, BOX))
    policy = OnnxPolicy(graph.model)
    observations = probe(SpaceCodec(CARTPOLE), 1000, np.random.default_rng(6))
    sampled = outputs_of(policy, observations, flags(1000, greedy=False))
    inner = np.abs(sampled["actions"]).max(axis=-1) < 0.9
    assert inner.sum() > 100
    distribution = TorchSquashedGaussian.from_logits(
        torch.from_numpy(sampled["action_dist_inputs"])
    )
    rllibs = distribution.logp(torch.from_numpy(sampled["actions"])).numpy()
    np.testing.assert_allclose(sampled["action_logp"][inner], rllibs[inner], rtol=0, atol=1e-3)


def sac_with_means_of(mean: float) -> tuple[Built, OnnxPolicy]:
    """Standard deviations of 1, whatever is observed."""
    built = build(sac(), CARTPOLE, BOX)
    with torch.no_grad():
        last = [each for each in built.module.pi.modules() if isinstance(each, torch.nn.Linear)][-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([mean] * 3 + [0.0] * 3))
    return built, OnnxPolicy(both(built)[0].model)


def test_no_action_of_sac_is_beyond_the_bounds_of_a_tangent() -> None:
    n = 10_000
    # Where the runtime's own tangent now and then gives a little more than 1.
    _, policy = sac_with_means_of(8.0)
    noise = np.linspace(0.0, 1.0, 3 * n, dtype=np.float32).reshape(n, 3)
    found = outputs_of(policy, {"": np.zeros((n, 4), np.float32)}, flags(n, greedy=False), noise)
    assert found["actions"].max() == 1.0


def test_sacs_log_densities_are_finite_and_exact_where_the_tangent_is_1() -> None:
    # Means of 12, whose tangent is 1 in single precision.
    built, policy = sac_with_means_of(12.0)
    noise = np.zeros((1, 3), np.float32)
    found = outputs_of(policy, {"": np.zeros((1, 4), np.float32)}, flags(1, greedy=True), noise)
    assert (found["actions"] == 1.0).all()
    exact = log_densities(built.module, "squashed_gaussian", found, noise)
    assert exact[0] > 50
    np.testing.assert_allclose(found["action_logp"], exact, rtol=1e-6)


def inputs_of(built: Built, observations: Any) -> torch.Tensor:
    """RLlib's distribution inputs or Q-values."""
    return inputs_under(both(built)[1], built, observations)


def inputs_under(module: Any, built: Built, observations: Any) -> torch.Tensor:
    codec = SpaceCodec(built.observation_space)
    n = len(next(iter(observations.values())))
    with torch.no_grad():
        batch = module_inputs(module._module, module._env_to_module, codec, observations, n)
        if isinstance(module._module, DefaultDQNTorchRLModule):
            return module._module.compute_q_values(batch)[QF_PREDS]
        return module._module.forward_exploration(batch, t=0)["action_dist_inputs"]


def rows_without_ties(space: gym.Space[Any], inputs: torch.Tensor) -> Any:
    if isinstance(space, Box):
        return np.ones(len(inputs), np.bool_)
    sizes = [int(n) for n in (space.nvec if isinstance(space, MultiDiscrete) else [space.n])]
    clear = np.ones(len(inputs), np.bool_)
    tolerance = 2e-5 * max(1.0, float(inputs.abs().max()))  # each of two may be off by half of it
    for part in inputs.split(sizes, dim=-1):
        top = part.topk(2, dim=-1).values
        clear &= (top[:, 0] - top[:, 1] > tolerance).numpy()
    return clear


def close(found: Any, wanted: Any, tolerance: float) -> None:
    largest = max(1.0, np.abs(wanted).max(initial=0.0))
    assert np.abs(found.astype(np.float64) - wanted).max(initial=0.0) <= tolerance * largest


# -- sampling

ROWS = 20_000


def sampled_actions(built: Built, env_steps: int = 0) -> tuple[Any, torch.Tensor]:
    """Many actions for one observation, and the distribution inputs there."""
    built.config.seed = 11
    factory = built.factory()
    assert factory.name == "onnx", factory.reason
    policy = factory.build(1, env_steps, cast("Any", None))
    one = probe(SpaceCodec(built.observation_space), 1, np.random.default_rng(2))
    many = {path: np.repeat(column, ROWS, axis=0) for path, column in one.items()}
    batch = policy.infer(many, flags(ROWS, greedy=False), contexts(ROWS))
    return batch.actions[""], inputs_of(built, one)[0]


def follows(choices: Any, probabilities: Any) -> bool:
    counts = np.bincount(choices, minlength=len(probabilities))
    expected = np.asarray(probabilities, np.float64)
    return bool(stats.chisquare(counts, expected / expected.sum() * len(choices)).pvalue > 0.001)


def test_discrete_actions_follow_the_softmax_of_the_logits() -> None:
    actions, logits = sampled_actions(build(ppo(), CARTPOLE, Discrete(5)))
    assert follows(actions, torch.softmax(logits, dim=-1))
    assert not follows(actions, torch.softmax(logits * 1.3, dim=-1))


@pytest.mark.parametrize("counts", [[3, 2, 4], [3, 3]])
def test_each_multi_discrete_action_follows_its_own_softmax(counts: list[int]) -> None:
    actions, logits = sampled_actions(build(ppo(), CARTPOLE, MultiDiscrete(counts)))
    for column, part in enumerate(logits.split(counts)):
        assert follows(actions[:, column], torch.softmax(part, dim=-1))


@pytest.mark.parametrize("free", [False, True])
def test_box_actions_are_normal_with_the_modules_mean_and_deviation(free: bool) -> None:
    actions, inputs = sampled_actions(build(ppo(free_log_std=free), CARTPOLE, BOX))
    mean, log_std = inputs.chunk(2)
    for column in range(3):
        standard = (actions[:, column] - float(mean[column])) / float(log_std[column].exp())
        assert stats.kstest(standard, "norm").pvalue > 0.001
    correlation = np.corrcoef(actions.T)
    assert np.abs(correlation - np.eye(3)).max() < 0.03


def test_sac_actions_are_tangents_of_normal_numbers() -> None:
    actions, inputs = sampled_actions(build(sac(), CARTPOLE, BOX))
    mean, log_std = inputs.chunk(2)
    for column in range(3):
        before = np.arctanh(actions[:, column].astype(np.float64).clip(-1 + 1e-7, 1 - 1e-7))
        deviation = float(log_std[column].clamp(-5, 2).exp())
        assert stats.kstest((before - float(mean[column])) / deviation, "norm").pvalue > 0.001
    assert not stats.kstest(actions[:, 0], "norm").pvalue > 0.001


@pytest.mark.parametrize("config", [DQNConfig, c51])
def test_q_actions_are_the_best_but_for_epsilon(config: Any) -> None:
    built = build(config().training(epsilon=[(0, 1.0), (1000, 0.2)]), CARTPOLE, Discrete(4))
    for env_steps, epsilon in ((0, 1.0), (500, 0.6), (5000, 0.2)):
        actions, q = sampled_actions(built, env_steps)
        probabilities = np.full(4, epsilon / 4)
        probabilities[int(q.argmax())] += 1.0 - epsilon
        assert follows(actions, probabilities)


def test_greedy_rows_do_not_explore_whatever_epsilon_is() -> None:
    built = build(DQNConfig().training(epsilon=1.0), CARTPOLE, Discrete(4))
    policy = built.factory().build(1, 0, cast("Any", None))
    observations = probe(SpaceCodec(CARTPOLE), 400, np.random.default_rng(2))
    q = inputs_of(built, observations)
    greedy = np.arange(400) % 2 == 0
    actions = policy.infer(observations, greedy, contexts(400)).actions[""]
    best = q.argmax(dim=-1).numpy()
    assert (actions[greedy] == best[greedy]).all()
    assert 0.1 < (actions[~greedy] == best[~greedy]).mean() < 0.4


def test_the_same_seed_gives_the_same_actions_and_another_worker_others() -> None:
    built = build(ppo())
    built.config.seed = 3
    observations = probe(SpaceCodec(CARTPOLE), 64, np.random.default_rng(2))

    def actions(worker_index: int) -> list[int]:
        policy = built.factory(worker_index).build(1, 0, cast("Any", None))
        return (
            policy.infer(observations, flags(64, greedy=False), contexts(64)).actions[""].tolist()
        )

    assert actions(1) == actions(1)
    assert actions(1) != actions(2)


def test_a_new_version_goes_on_in_the_noise_instead_of_repeating_it() -> None:
    built = build(ppo(), CARTPOLE, BOX)
    built.config.seed = 3
    factory = built.factory()
    observations = {"": np.zeros((1, 4), np.float32)}
    actions = [
        factory.build(version, 0, cast("Any", None))
        .infer(observations, flags(1, greedy=False), contexts(1))
        .actions[""]
        for version in (1, 2)
    ]
    assert not np.array_equal(*actions)


def test_large_offsets_survive_the_filter_in_single_precision() -> None:
    built = build(ppo(), Box(-np.inf, np.inf, (3,)), None, MeanStdFilter)
    codec = SpaceCodec(built.observation_space)
    rng = np.random.default_rng(0)
    rows = {"": (20_000.0 + rng.standard_normal((50, 3))).astype(np.float32)}
    module_inputs(built.module, built.env_to_module, codec, rows, 50)
    policy = built.factory().build(1, 0, cast("Any", None))
    found = policy.infer(rows, flags(50, greedy=True), contexts(50)).outputs["action_dist_inputs"]
    built.env_to_module.connectors[0]._update_stats = False
    with torch.no_grad():
        batch = module_inputs(built.module, built.env_to_module, codec, rows, 50)
        wanted = built.module.forward_exploration(batch, t=0)["action_dist_inputs"].numpy()
    close(found, wanted, 1e-5)


def test_the_policy_file_alone_gives_the_servers_actions() -> None:
    built = build(ppo(), NESTED, BOX, FlattenObservations)
    policy = cast("OnnxEnginePolicy", built.factory().build(7, 0, cast("Any", None)))
    loaded = OnnxPolicy(policy.model)
    observations = probe(SpaceCodec(NESTED), 9, np.random.default_rng(1))
    greedy = flags(9, greedy=True)
    actions, env_actions, outputs = loaded.act(observations, greedy)
    served = policy.infer(observations, greedy, contexts(9))
    assert np.array_equal(actions[""], served.actions[""])
    assert np.array_equal(env_actions[""], served.env_actions[""])
    assert np.array_equal(outputs["action_logp"], served.outputs["action_logp"])
    noise = NoisePool(loaded.spec.noise).take(greedy)
    (again,) = loaded.run(observations, noise, ("env_actions",))
    assert np.array_equal(again, env_actions[""])
