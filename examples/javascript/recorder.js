// Steps into chunks: what a client that acts alone tells the server of its episodes.

import { floatBatch, stack, toTensor } from './tensors.js';

export class Recorder {
  #chunks = 0;

  /** An episode begins. */
  begin(episode, observation) {
    this.episode = episode;
    this.firstStep = 0;
    this.#empty(observation);
  }

  /** Steps since the last cut. */
  get steps() {
    return this.rewards.length;
  }

  /** What the policy gave, what it earned, and what was seen then. */
  add(outputs, reward, observation) {
    this.outputs.push(outputs);
    this.rewards.push(reward);
    this.observations.push(observation);
  }

  /** The steps since the last cut, all of one policy, as a `Chunk`; there must be some. */
  cut(policy, status) {
    const column = (role) => stack(this.outputs.map((outputs) => outputs[role]));
    this.#chunks += 1;
    const chunk = {
      sequence: this.#chunks,
      episode: this.episode,
      policy_id: policy.policyId,
      policy_version: policy.version,
      policy_sha256: policy.sha256,
      first_step: this.firstStep,
      observations: floatBatch(this.observations),
      actions: { leaves: { '': column('actions') } },
      rewards: toTensor('DATA_TYPE_FLOAT64', [this.steps], this.rewards),
      outputs: Object.fromEntries(policy.recorded.map((role) => [role, column(role)])),
      status,
    };
    this.firstStep += this.steps;
    this.#empty(this.observations.at(-1)); // the next chunk begins where this one ends
    return chunk;
  }

  #empty(observation) {
    this.observations = [observation];
    this.outputs = [];
    this.rewards = [];
  }
}
