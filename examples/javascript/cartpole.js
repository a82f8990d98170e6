// CartPole-v1: the physics of Gymnasium's environment, 500 steps at most. It knows nothing
// of learning.

const GRAVITY = 9.8;
const CART_MASS = 1.0;
const POLE_MASS = 0.1;
const TOTAL_MASS = CART_MASS + POLE_MASS;
const POLE_HALF_LENGTH = 0.5;
const FORCE = 10.0; // newtons
const STEP_S = 0.02;
export const MAX_X = 2.4;
export const MAX_ANGLE = (12 * 2 * Math.PI) / 360;
const MAX_STEPS = 500;

export class CartPole {
  #random = Math.random;

  /**
   * Starts an episode; returns its first observation.
   *
   * @param {{seed?: number, state?: number[]}} from  the same seed gives the same episodes from
   *     here on; a state is where this one starts
   */
  reset({ seed, state } = {}) {
    if (seed !== undefined) this.#random = generator(seed);
    this.state = state ?? Array.from({ length: 4 }, () => this.#random() * 0.1 - 0.05);
    this.steps = 0;
    return Float32Array.from(this.state);
  }

  /** Pushes the cart left (0) or right (1) for 20 ms. */
  step(action) {
    const [x, velocity, angle, spin] = this.state;
    const cos = Math.cos(angle);
    const sin = Math.sin(angle);
    const push = action === 1 ? FORCE : -FORCE;
    const drive = (push + POLE_MASS * POLE_HALF_LENGTH * spin ** 2 * sin) / TOTAL_MASS;
    const angular =
      (GRAVITY * sin - cos * drive) /
      (POLE_HALF_LENGTH * (4 / 3 - (POLE_MASS * cos ** 2) / TOTAL_MASS));
    const linear = drive - (POLE_MASS * POLE_HALF_LENGTH * angular * cos) / TOTAL_MASS;

    this.state = [
      x + STEP_S * velocity,
      velocity + STEP_S * linear,
      angle + STEP_S * spin,
      spin + STEP_S * angular,
    ];
    this.steps += 1;
    const terminated = Math.abs(this.state[0]) > MAX_X || Math.abs(this.state[2]) > MAX_ANGLE;
    return {
      observation: Float32Array.from(this.state),
      reward: 1.0,
      terminated,
      truncated: this.steps >= MAX_STEPS,
    };
  }
}

/** Numbers in [0, 1) that depend on the seed alone (Mulberry32). */
function generator(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
