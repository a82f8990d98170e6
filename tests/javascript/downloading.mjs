// Downloads the policy once: node downloading.mjs MODULE ADDRESS

const [module, server] = process.argv.slice(2);
const { PolicyClient } = await import(module);
const client = await PolicyClient.open({ server, name: 'test', mode: 'INFERENCE_MODE_LOCAL' });
console.log((await client.getPolicy()).toString());
await client.close();
