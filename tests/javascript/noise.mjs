// Mean and variance of a policy's noise: node noise.mjs MODULE KIND

const [module, kind] = process.argv.slice(2);
const { OnnxPolicy } = await import(module);
const policy = new OnnxPolicy();
policy.noise = { kind, size: 100_000, greedy: 0 };
const drawn = policy.drawNoise();
const mean = drawn.reduce((sum, value) => sum + value, 0) / drawn.length;
const variance = drawn.reduce((sum, value) => sum + (value - mean) ** 2, 0) / drawn.length;
console.log(JSON.stringify([mean, variance]));
