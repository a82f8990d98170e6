// What remote.js and local.js have in common: their options, and how they end.

import { readFileSync } from 'node:fs';
import { hostname } from 'node:os';
import { parseArgs } from 'node:util';

import { PolicyError } from './contract.js';

// What the server says is told in its words; anything else is a bug, with its stack.
process.on('uncaughtException', (error) => {
  console.error(error instanceof PolicyError ? error.message : error);
  process.exit(1);
});

/** The options of the command line; `defaults` names those of the command, and their values. */
export function options(defaults) {
  const texts = Object.entries({ server: 'localhost:9900', 'token-file': '', 'tls-ca': '' });
  const numbers = Object.entries(defaults);
  const known = Object.fromEntries(
    [...texts, ...numbers].map(([name, value]) => [
      name,
      { type: 'string', default: String(value) },
    ]),
  );
  try {
    const { values } = parseArgs({ options: known });
    return {
      server: values.server,
      name: `javascript ${hostname()} ${process.pid}`,
      token: values['token-file'] && readFileSync(values['token-file'], 'utf8').trim(),
      rootCertificate: values['tls-ca'] && readFileSync(values['tls-ca']),
      ...Object.fromEntries(numbers.map(([name]) => [name, wholeNumber(name, values[name])])),
    };
  } catch (error) {
    const all = Object.entries(known).map(([name, { default: value }]) => (value ? `--${name} ${value}` : `--${name}`));
    console.error(`${error.message}\noptions, and their defaults: ${all.join(', ')}`);
    process.exit(2);
  }
}

function wholeNumber(name, text) {
  const number = Number(text);
  if (!Number.isSafeInteger(number) || number < 1) {
    throw new Error(`--${name}: expected a whole number from 1 up, got '${text}'`);
  }
  return number;
}
