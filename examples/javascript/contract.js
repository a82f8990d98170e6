// The contract, loaded from the .proto as it is: services, messages, and what a failure says.

import { fileURLToPath } from 'node:url';

import * as grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const PROTO = new URL('../../proto/policyserver/v1/policyserver.proto', import.meta.url);
const definition = protoLoader.loadSync(fileURLToPath(PROTO), {
  keepCase: true, // fields are called what the .proto calls them
  longs: Number, // whatever is counted here stays far below 2 ** 53
  enums: String,
  defaults: true,
  oneofs: true,
});

export const contract = grpc.loadPackageDefinition(definition).policyserver.v1;

const ERROR_TRAILER = 'policyserver-error-bin';

/** Channel and server options: no message is too long, and a dead connection is noticed in 20 s. */
export const GRPC_OPTIONS = {
  'grpc.max_receive_message_length': -1,
  'grpc.max_send_message_length': -1,
  'grpc.keepalive_time_ms': 10_000,
  'grpc.keepalive_timeout_ms': 10_000,
  'grpc.keepalive_permit_without_calls': 1,
};

const { OK, CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE } =
  grpc.status;
const NOT_NOW = new Set([UNAVAILABLE, RESOURCE_EXHAUSTED]);
const BROKEN = new Set([OK, CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE]);

/** Why a call, a request of a stream, or a row failed. */
export class PolicyError extends Error {
  constructor(status, text, detail) {
    super(detail ? [detail.field, detail.message].filter(Boolean).join(': ') : text);
    this.reason = detail?.reason ?? 'ERROR_REASON_UNSPECIFIED';
    /** The server, asked again, may say yes. */
    this.notNow = detail !== undefined && NOT_NOW.has(status);
    /** It was not the server that spoke: the connection is gone, or never was. */
    this.broken = detail === undefined && BROKEN.has(status);
    this.retryAfterMs = detail?.retry_after && milliseconds(detail.retry_after);
  }

  /** Of what gRPC says of a call that has ended. */
  static ofCall({ code, details, metadata }) {
    const [trailer] = metadata?.get(ERROR_TRAILER) ?? [];
    return new PolicyError(code, details, trailer && contract.ErrorDetail.deserialize(trailer));
  }

  /** Of an ErrorDetail that came in band. */
  static ofDetail(detail) {
    return new PolicyError(detail.status_code, '', detail);
  }
}

/** A request that we, as a server, refuse: with its ErrorDetail, and as grpc-js wants it. */
export class Refusal extends Error {
  constructor(status, reason, message, field = '') {
    super(message);
    this.code = grpc.status[status];
    this.details = message;
    this.detail = { reason: `ERROR_REASON_${reason}`, field, message, status_code: this.code };
    this.metadata = new grpc.Metadata();
    this.metadata.set(ERROR_TRAILER, contract.ErrorDetail.serialize(this.detail));
  }
}

/** A google.protobuf.Duration in milliseconds. */
export function milliseconds({ seconds, nanos }) {
  return seconds * 1e3 + nanos / 1e6;
}
