// Hosts CartPole for a trainer that steps it: the contract's EnvService.
//
//   node host.js --port 9901

import { randomBytes } from 'node:crypto';
import { parseArgs } from 'node:util';

import * as grpc from '@grpc/grpc-js';

import { contract, GRPC_OPTIONS, Refusal } from './contract.js';
import { Hosted, SPACES } from './hosted.js';

const LEASE_S = 60;
const MAX_ENVS = 1000;
const handles = new Map(); // environments, and the timer that closes them, by handle

function make({ protocol_version, env_id, render_mode, num_envs }) {
  if (protocol_version.split('.')[0] !== '1') {
    const expected = `expected protocol 1, got "${protocol_version}"`;
    throw new Refusal('FAILED_PRECONDITION', 'INCOMPATIBLE_PROTOCOL', expected, 'protocol_version');
  }
  if (!['', 'CartPole-v1'].includes(env_id) || render_mode) {
    const known = 'this host knows CartPole-v1, without rendering';
    throw new Refusal('NOT_FOUND', 'UNKNOWN_ENVIRONMENT', known, 'env_id');
  }
  if (num_envs > MAX_ENVS) {
    const expected = `expected at most ${MAX_ENVS} environments, got ${num_envs}`;
    throw new Refusal('RESOURCE_EXHAUSTED', 'LIMIT_EXCEEDED', expected, 'num_envs');
  }
  const env_handle = randomBytes(16).toString('hex'); // whoever knows it may step them
  handles.set(env_handle, { hosted: new Hosted(num_envs) });
  find(env_handle);
  console.log(`made ${num_envs || 1}`);
  return { env_handle, ...SPACES, protocol_version: '1.0', lease: { seconds: LEASE_S } };
}

/** The environments of a handle, their lease renewed; while they are driven it does not run. */
function find(handle, { driven = false } = {}) {
  const entry = handles.get(handle);
  if (!entry) {
    const cause = 'no such environments: closed, or not heard of for a lease; make others';
    throw new Refusal('NOT_FOUND', 'UNKNOWN_ENVIRONMENT', cause, 'env_handle');
  }
  clearTimeout(entry.timer);
  if (!driven) entry.timer = setTimeout(close, LEASE_S * 1000, handle);
  return entry.hosted;
}

function close(handle) {
  clearTimeout(handles.get(handle)?.timer);
  if (handles.delete(handle)) console.log('closed');
}

/** Resets and steps over one stream; a refusal is an answer, and the stream goes on. */
function drive(stream) {
  // Named ahead of the first request, so that nothing is left of a client that asks for nothing.
  let [handle] = stream.metadata.get('policyserver-env-handle');
  if (handles.has(handle)) find(handle, { driven: true });
  else handle = '';
  stream.on('data', ({ request, reset, step }) => {
    try {
      handle ||= (reset ?? step)?.env_handle;
      const hosted = find(handle, { driven: true });
      if (request === 'reset') stream.write({ reset: hosted.reset(reset) });
      else stream.write({ step: hosted.step(step) });
    } catch (error) {
      stream.write({ error: refusal(error).detail });
    }
  });
  stream.on('end', () => stream.end());
  stream.on('error', () => {}); // the connection broke: it is closed as well
  stream.on('close', () => close(handle));
}

/** A handler that answers what `method` returns, or refuses with what it throws. */
function unary(method) {
  return ({ request }, callback) => {
    try {
      callback(null, method(request));
    } catch (error) {
      callback(refusal(error));
    }
  };
}

function refusal(error) {
  if (error instanceof Refusal) return error;
  console.error(error);
  return new Refusal('INTERNAL', 'INTERNAL', 'a bug of this host; its log says more');
}

const { values } = parseArgs({
  options: {
    host: { type: 'string', default: '127.0.0.1' },
    port: { type: 'string', default: '9901' },
  },
});
const server = new grpc.Server(GRPC_OPTIONS);
server.addService(contract.EnvService.service, {
  Make: unary(make),
  Reset: unary((request) => find(request.env_handle).reset(request)),
  Step: unary((request) => find(request.env_handle).step(request)),
  Close: unary((request) => close(request.env_handle) ?? {}),
  Drive: drive, // Render and StreamFrames are UNIMPLEMENTED
});
const credentials = grpc.ServerCredentials.createInsecure();
server.bindAsync(`${values.host}:${values.port}`, credentials, (error, port) => {
  if (error) {
    console.error(`cannot listen on ${values.host}:${values.port}: ${error.message}`);
    process.exit(1);
  }
  console.log(`hosting CartPole-v1 on ${values.host}:${port}`);
});
