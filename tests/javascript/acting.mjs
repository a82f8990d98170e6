// Runs a policy file once: node acting.mjs MODULE FILE OBSERVATION NOISE

import { readFileSync } from 'node:fs';

const [module, file, observation, noise] = process.argv.slice(2);
const { OnnxPolicy } = await import(module);
const policy = await OnnxPolicy.load(readFileSync(file));
const given = Float32Array.from(JSON.parse(noise));
const outputs = await policy.act(Float32Array.from(JSON.parse(observation)), given);
const plain = Object.entries(outputs).map(([role, { data }]) => [role, Array.from(data, Number)]);
console.log(JSON.stringify({ version: policy.version, outputs: Object.fromEntries(plain) }));
