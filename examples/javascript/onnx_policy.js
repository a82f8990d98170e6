// A policy file: what it says of itself, and how it is run. Any ONNX runtime will do; everything
// that one must know is in the file's metadata (docs/onnx.md).

import ort from 'onnxruntime-node';
import protobuf from 'protobufjs';

import { sha256 } from './policy_client.js';

const PREFIX = 'policyserver.';
const SCHEMA = '1';

// onnxruntime-node does not show a file's metadata, so we read it ourselves: this is all of
// onnx.proto that it takes.
const ModelProto = protobuf
  .parse(
    `syntax = "proto3";
     message ModelProto { repeated Entry metadata_props = 14; }
     message Entry { string key = 1; string value = 2; }`,
    { keepCase: true },
  )
  .root.lookupType('ModelProto');

const RANDOM = {
  gumbel: () => -Math.log(Math.max(-Math.log(1 - Math.random()), 1e-38)),
  normal: () =>
    Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()),
  uniform: () => Math.floor(Math.random() * 2 ** 24) / 2 ** 24, // as float32, still below 1
};

export class OnnxPolicy {
  /** @param {Uint8Array} file  a complete policy file */
  static async load(file) {
    const policy = new OnnxPolicy();
    const entries = ModelProto.decode(file).metadata_props ?? [];
    policy.metadata = Object.fromEntries(entries.map(({ key, value }) => [key, value]));
    const schema = policy.#field('schema');
    if (schema !== SCHEMA) throw new Error(`expected a policy file of schema 1, got ${schema}`);
    policy.policyId = policy.#field('policy_id');
    policy.version = Number(policy.#field('policy_version'));
    policy.noise = JSON.parse(policy.#field('noise')); // { kind, size, greedy, input }
    policy.inputs = JSON.parse(policy.#field('inputs')); // [{ path, name, dtype, shape }]
    policy.roles = JSON.parse(policy.#field('roles')); // graph outputs by role
    policy.recorded = JSON.parse(policy.#field('recorded')); // roles that belong to the experience
    const states = JSON.parse(policy.#field('states'));
    if (states.length > 0) throw new Error('a recurrent policy: carrying its states is not shown');
    policy.sha256 = sha256(file);
    policy.session = await ort.InferenceSession.create(file, { intraOpNumThreads: 1 });
    return policy;
  }

  #field(name) {
    return this.metadata[PREFIX + name];
  }

  /** Random numbers for one row; one constant instead yields the likeliest action. */
  drawNoise(greedy = false) {
    const { kind, size, greedy: constant } = this.noise;
    return Float32Array.from({ length: size }, greedy ? () => constant : RANDOM[kind]);
  }

  /**
   * Chooses one action.
   *
   * @param {Float32Array} observation  raw; the policies here see one flat float32 Box
   * @param {Float32Array} noise  from `drawNoise`
   * @returns {Promise<Record<string, ort.Tensor>>}  outputs by role, each `[1, ...]`: `actions` is
   *     learnt from, `env_actions` is to be executed, the `recorded` ones belong to the experience
   */
  async act(observation, noise = this.drawNoise()) {
    const [input] = this.inputs;
    const outputs = await this.session.run({
      [input.name]: new ort.Tensor(input.dtype, observation, [1, ...input.shape]),
      [this.noise.input]: new ort.Tensor('float32', noise, [1, noise.length]),
    });
    const roles = { env_actions: this.roles.actions, ...this.roles };
    return Object.fromEntries(
      Object.entries(roles).map(([role, output]) => [role, outputs[output]]),
    );
  }
}
