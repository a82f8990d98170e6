// A session with a policy server: opened, resumed, asked for actions or for the policy, closed.
// docs/protocol.md says why it does what it does.

import { createHash } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';

import * as grpc from '@grpc/grpc-js';

import { contract, GRPC_OPTIONS, PolicyError } from './contract.js';
import { discreteValues, floatBatch } from './tensors.js';

const CALL_MS = 60_000;
const PATIENCE_MS = 60_000; // with a server that is gone; one that says "not now" is waited for
const MAX_REDIRECTS = 3;

/** The server does not know our session any more, and has opened another one. */
export class SessionLost extends Error {}

export class PolicyClient {
  #options;
  #metadata = new grpc.Metadata();
  #service;
  #stream = null;
  #requests = 0;
  #episodes = 0;

  /**
   * A client with an open session.
   *
   * @param {object} options  `server` ("host:port"), `mode` (an InferenceMode), `name`, and
   *     perhaps `token` and `rootCertificate`
   */
  static async open(options) {
    const client = new PolicyClient(options);
    await client.#persist(() => client, { reopen: true });
    return client;
  }

  /** Use `open`. */
  constructor(options) {
    this.#options = options;
    if (options.token) this.#metadata.set('authorization', `Bearer ${options.token}`);
    this.#connect(options.server);
  }

  /** A number for a new episode; never the same twice. */
  nextEpisode() {
    this.#episodes += 1;
    return this.#episodes;
  }

  /** Calls a method of the service in this session until it is answered; repeating is safe. */
  call(method, request) {
    return this.#persist(() => this.#unary(method, request));
  }

  /**
   * The newest policy file.
   *
   * @param {Buffer} have  SHA-256 of the file that we have; empty for none
   * @param {number} waitMs  for another one, before we are told that there is none
   * @returns {Promise<Buffer | null>}  the complete file; null: there is no other
   */
  getPolicy(have = Buffer.alloc(0), waitMs = 0) {
    return this.#persist(() => this.#download(have, waitMs));
  }

  /**
   * Records one row per episode and returns their actions, over one stream.
   *
   * @param {{episode: number, step: number, reward: number, status: string,
   *     observation: Float32Array}[]} rows
   * @param {object[]} starts  an `EpisodeStart` for each new episode that needs one
   * @returns {Promise<number[]>}  the rows' actions; 0 for those that end their episode
   */
  async act(rows, starts = []) {
    const actions = rows.map(() => 0);
    let due = rows.map((_, index) => index);
    await this.#persist(async () => {
      const groups = [stepRows(due.map((index) => rows[index]))];
      const [answer] = (await this.#ask({ starts, groups })).groups;
      const given = answer.actions ? discreteValues(answer.actions) : [];
      due.forEach((index, i) => (actions[index] = given[i] ?? 0));
      if (answer.actions) this.version = answer.policy_version;

      // Only the refused rows are sent again, and only if the server may say yes then.
      due = answer.faults.map((fault) => due[fault.index]);
      const errors = answer.faults.map((fault) => PolicyError.ofDetail(fault.error));
      if (errors.length > 0) throw errors.find((error) => !error.notNow) ?? errors[0];
    });
    return actions;
  }

  /** Ends the session; unfinished episodes are truncated. */
  async close() {
    // Where that fails, the lease ends it.
    await this.#unary('CloseSession', {}).catch((error) => console.warn(error.message));
    this.#stream?.call.cancel();
    this.#service.close();
  }

  #connect(address) {
    const { server, rootCertificate } = this.#options;
    const credentials = rootCertificate
      ? grpc.credentials.createSsl(rootCertificate)
      : grpc.credentials.createInsecure();
    // After a redirect, TLS still verifies the name that was dialled first.
    const name = { 'grpc.ssl_target_name_override': server.replace(/:\d+$/, '') };
    this.#stream?.call.cancel();
    this.#service?.close();
    this.#service = new contract.PolicyService(address, credentials, { ...GRPC_OPTIONS, ...name });
  }

  /** Opens a session, or resumes ours. */
  async #openSession() {
    const known = this.session?.session_id;
    for (let redirects = 0; ; redirects += 1) {
      const session = await this.#unary('OpenSession', {
        client_name: this.#options.name,
        protocol_version: '1.0',
        inference_mode: this.#options.mode,
      });
      if (!session.redirect_address) {
        this.session = session; // its session_id is a secret: who has it speaks for us
        break;
      }
      if (redirects === MAX_REDIRECTS) throw new Error('redirected too often');
      this.#connect(session.redirect_address);
    }
    this.version = this.session.policy_version;
    if (known && known !== this.session.session_id) {
      throw new SessionLost('our session is over; another one is open');
    }
  }

  /** Runs `attempt` until it succeeds, fails for good, or the server is gone for too long. */
  async #persist(attempt, { reopen = false } = {}) {
    let lostAt = null;
    for (let backoffMs = 100; ; backoffMs = Math.min(2 * backoffMs, 2000)) {
      try {
        if (reopen) await this.#openSession();
        return await attempt();
      } catch (error) {
        const unknown = error.reason === 'ERROR_REASON_UNKNOWN_SESSION';
        if (!(error.notNow || error.broken || unknown)) throw error;
        if (error.broken && lostAt === null) console.warn(`trying again: ${error.message}`);
        lostAt = error.broken ? (lostAt ?? Date.now()) : null;
        if (lostAt !== null && Date.now() - lostAt > PATIENCE_MS) throw error;
        await sleep(error.retryAfterMs ?? backoffMs * (0.5 + Math.random() / 2));
        if (error.broken) this.#connect(this.#options.server); // a channel has a backoff of its own
        reopen = error.broken || unknown;
      }
    }
  }

  #unary(method, request) {
    const named = { session_id: this.session?.session_id, ...request };
    const options = { deadline: Date.now() + CALL_MS };
    return new Promise((resolve, reject) => {
      this.#service[method](named, this.#metadata, options, (error, response) =>
        error ? reject(PolicyError.ofCall(error)) : resolve(response),
      );
    });
  }

  async #download(have, waitMs) {
    const { session_id } = this.session;
    const request = { session_id, have_sha256: have, wait: { seconds: waitMs / 1000 } };
    const options = { deadline: Date.now() + waitMs + CALL_MS };
    const parts = this.#service.GetPolicy(request, this.#metadata, options);
    const pieces = [];
    let header;
    try {
      for await (const part of parts) {
        if (part.header) header = part.header;
        else pieces.push(part.piece);
      }
    } catch (error) {
      throw PolicyError.ofCall(error);
    }
    if (header?.sha256.equals(have)) return null;
    const file = Buffer.concat(pieces);
    if (!header?.sha256.equals(sha256(file))) {
      throw new PolicyError(grpc.status.UNAVAILABLE, 'the policy file was damaged on its way');
    }
    return file;
  }

  #ask(act) {
    this.#stream ??= this.#openStream();
    const { call, waiting } = this.#stream;
    this.#requests += 1;
    const request = this.#requests;
    return new Promise((resolve, reject) => {
      waiting.set(request, { resolve, reject });
      call.write({ request, act: { session_id: this.session.session_id, ...act } });
    });
  }

  #openStream() {
    const call = this.#service.StreamAct(this.#metadata);
    const stream = { call, waiting: new Map() }; // requests without an answer, by their number
    call.on('data', ({ request, act, error }) => {
      const { resolve, reject } = stream.waiting.get(request);
      stream.waiting.delete(request);
      if (error) reject(PolicyError.ofDetail(error));
      else resolve(act);
    });
    call.on('error', () => {}); // its status comes as an event, too
    call.on('status', (status) => {
      if (this.#stream === stream) this.#stream = null;
      for (const { reject } of stream.waiting.values()) reject(PolicyError.ofCall(status));
    });
    return stream;
  }
}

function stepRows(rows) {
  return {
    episodes: rows.map((row) => row.episode),
    steps: rows.map((row) => row.step),
    rewards: rows.map((row) => row.reward),
    statuses: rows.map((row) => row.status),
    observations: floatBatch(rows.map((row) => row.observation)),
  };
}

/** What a policy file is known by. */
export function sha256(file) {
  return createHash('sha256').update(file).digest();
}
