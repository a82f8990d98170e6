// Tensors of the contract and JavaScript's typed arrays: the same bytes, row-major, little-endian.

import os from 'node:os';

if (os.endianness() !== 'LE') throw new Error('typed arrays are big-endian here: swap their bytes');

const ARRAYS = {
  DATA_TYPE_BOOL: Uint8Array,
  DATA_TYPE_UINT8: Uint8Array,
  DATA_TYPE_UINT16: Uint16Array,
  DATA_TYPE_UINT32: Uint32Array,
  DATA_TYPE_INT8: Int8Array,
  DATA_TYPE_INT16: Int16Array,
  DATA_TYPE_INT32: Int32Array,
  DATA_TYPE_INT64: BigInt64Array,
  DATA_TYPE_FLOAT32: Float32Array,
  DATA_TYPE_FLOAT64: Float64Array,
};

/** A Tensor of that type and shape; `values` are numbers, or a typed array of it. */
export function toTensor(dtype, shape, values) {
  const ArrayType = ARRAYS[dtype];
  const convert = ArrayType === BigInt64Array ? BigInt : Number;
  const array = values instanceof ArrayType ? values : ArrayType.from(values, convert);
  return { dtype, shape, data: bytes(array) };
}

/** The values of a Tensor, flat, as a typed array of its own memory. */
export function fromTensor({ dtype, data }) {
  // A copy, for a typed array must start at a multiple of its element's size.
  const memory = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength);
  return new ARRAYS[dtype](memory);
}

/** A Batch of N values of a float32 Box [K], given as N arrays of K numbers. */
export function floatBatch(rows) {
  const shape = [rows.length, rows[0].length];
  const values = Float32Array.from(rows.flatMap((row) => [...row]));
  return { leaves: { '': toTensor('DATA_TYPE_FLOAT32', shape, values) } };
}

/** The N values of a Discrete space, as numbers. */
export function discreteValues(batch) {
  return Array.from(fromTensor(batch.leaves['']), Number);
}

/** N tensors of onnxruntime, each `[1, ...]`, as one Tensor `[N, ...]`. */
export function stack(tensors) {
  const [{ type, dims }] = tensors;
  const shape = [tensors.length, ...dims.slice(1)];
  const data = Buffer.concat(tensors.map((tensor) => bytes(tensor.data)));
  return { dtype: `DATA_TYPE_${type.toUpperCase()}`, shape, data };
}

function bytes(array) {
  return Buffer.from(array.buffer, array.byteOffset, array.byteLength);
}
