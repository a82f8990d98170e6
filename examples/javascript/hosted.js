// The CartPoles of one Make, stepped together: between the contract's messages and the simulator.

import { CartPole, MAX_ANGLE, MAX_X } from './cartpole.js';
import { Refusal } from './contract.js';
import { discreteValues, floatBatch, toTensor } from './tensors.js';

const HIGH = [2 * MAX_X, Infinity, 2 * MAX_ANGLE, Infinity];
const bound = (values) => toTensor('DATA_TYPE_FLOAT32', [4], Float32Array.from(values));

export const SPACES = {
  observation_space: {
    box: {
      dtype: 'DATA_TYPE_FLOAT32',
      shape: [4],
      low: bound(HIGH.map((high) => -high)),
      high: bound(HIGH),
    },
  },
  action_space: { discrete: { n: 2 } },
};

export class Hosted {
  /** @param {number} count  0: a single one, which only `reset` resets */
  constructor(count) {
    this.autoreset = count > 0;
    this.envs = Array.from({ length: count || 1 }, () => new CartPole());
    this.running = null; // of each, whether its episode goes on; null before the first reset
  }

  /** A ResetRequest's ResetResponse. */
  reset({ seeds, options }) {
    if (seeds.length > 0 && seeds.length !== this.envs.length) {
      const expected = `expected no seeds or ${this.envs.length}, got ${seeds.length}`;
      throw new Refusal('INVALID_ARGUMENT', 'MALFORMED_TENSOR', expected, 'seeds');
    }
    const state = startOf(options);
    this.running = this.envs.map(() => true);
    return {
      observations: floatBatch(this.envs.map((env, i) => env.reset({ seed: seeds[i], state }))),
    };
  }

  /** A StepRequest's StepResponse. */
  step({ actions }) {
    const chosen = this.#read(actions);
    if (this.running === null) {
      throw new Refusal('FAILED_PRECONDITION', 'STEP_OUT_OF_ORDER', 'reset before the first step');
    }
    if (!this.autoreset && !this.running[0]) {
      throw new Refusal('FAILED_PRECONDITION', 'EPISODE_ENDED', 'reset before the next step');
    }
    // With autoreset, the step after an end is a reset: its action means nothing.
    const steps = this.envs.map((env, i) =>
      this.running[i]
        ? env.step(chosen[i])
        : { observation: env.reset(), reward: 0, terminated: false, truncated: false },
    );
    this.running = steps.map(({ terminated, truncated }) => !terminated && !truncated);
    return {
      observations: floatBatch(steps.map((step) => step.observation)),
      rewards: steps.map((step) => step.reward),
      terminated: steps.map((step) => step.terminated),
      truncated: steps.map((step) => step.truncated),
    };
  }

  #read(actions) {
    const { dtype, shape } = actions?.leaves[''] ?? {};
    if (dtype !== 'DATA_TYPE_INT64' || String(shape) !== String(this.envs.length)) {
      const expected = `expected DATA_TYPE_INT64 [${this.envs.length}], got ${dtype} [${shape}]`;
      throw new Refusal('INVALID_ARGUMENT', 'SPACE_MISMATCH', expected, 'actions');
    }
    const chosen = discreteValues(actions);
    if (!chosen.every((action) => action === 0 || action === 1)) {
      const expected = `expected actions 0 or 1, got ${chosen}`;
      throw new Refusal('INVALID_ARGUMENT', 'SPACE_MISMATCH', expected, 'actions');
    }
    return chosen;
  }
}

/** The state to start from, if the options give one: {"state": [x, velocity, angle, spin]}. */
function startOf(options) {
  return options?.fields.state?.listValue.values.map((value) => value.numberValue);
}
