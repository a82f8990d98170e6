// Plays CartPole with the downloaded policy and tells the server what came of it.
//
//   node local.js --server localhost:9900 --episodes 100

import { CartPole } from './cartpole.js';
import { options } from './command.js';
import { PolicyError } from './contract.js';
import { OnnxPolicy } from './onnx_policy.js';
import { PolicyClient, SessionLost } from './policy_client.js';
import { Recorder } from './recorder.js';

const { episodes, ...where } = options({ episodes: 100 });
const client = await PolicyClient.open({ ...where, mode: 'INFERENCE_MODE_LOCAL' });
const cartpole = new CartPole();
let recorder = new Recorder();
let chunks = []; // to be uploaded
let steps = 0; // in them, and since
let policy = null;

/** Takes the newest policy; waits so long for another than ours. */
async function refresh(waitMs = 0) {
  const file = await client.getPolicy(policy?.sha256, waitMs);
  if (file === null) return;
  policy = await OnnxPolicy.load(file);
  console.log(`policy version ${policy.version}, ${file.length} bytes`);
}

/**
 * Uploads what there is. A server that learns on-policy holds its answer back until it wants more,
 * and the answer names the policy that it wants it from.
 *
 * @returns {Promise<Set<number>>}  episodes that are over for the server, and cannot go on
 */
async function upload() {
  const answer = await client.call('UploadEpisodes', { chunks });
  console.log(`uploaded ${steps} steps in ${chunks.length} chunks`);
  const refused = new Set();
  for (const { index, error } of answer.faults) {
    const { episode } = chunks[index];
    const late = error.reason === 'ERROR_REASON_STALE_POLICY' || refused.has(episode);
    if (!late) throw PolicyError.ofDetail(error);
    refused.add(episode);
    console.log(`episode ${episode} refused: ${error.message}`);
  }
  chunks = [];
  steps = 0;
  while (policy.version < answer.policy_version) await refresh(30_000);
  return refused;
}

async function play(episode) {
  let observation = cartpole.reset();
  let status = 'STEP_STATUS_RUNNING';
  let total = 0;
  recorder.begin(episode, observation);
  while (status === 'STEP_STATUS_RUNNING') {
    const outputs = await policy.act(observation);
    const step = cartpole.step(Number(outputs.env_actions.data[0]));
    observation = step.observation;
    total += step.reward;
    if (step.truncated) status = 'STEP_STATUS_TRUNCATED';
    if (step.terminated) status = 'STEP_STATUS_TERMINATED';
    recorder.add(outputs, step.reward, observation);
    steps += 1;
    // A chunk is of one episode and one policy. The policy changes with an upload, never else.
    const full = steps >= client.session.steps_per_upload;
    if (full || status !== 'STEP_STATUS_RUNNING') chunks.push(recorder.cut(policy, status));
    if (full && (await upload()).has(episode)) return;
  }
  console.log(`episode ${episode}: return ${total}, policy version ${policy.version}`);
}

await refresh();
for (let played = 0; played < episodes; ) {
  try {
    await play(client.nextEpisode());
    played += 1;
  } catch (error) {
    if (!(error instanceof SessionLost)) throw error;
    // Our chunks are lost with it; sending them again as resumed episodes is left out here.
    console.log(error.message);
    recorder = new Recorder();
    chunks = [];
    steps = 0;
    await refresh();
  }
}
if (chunks.length > 0) await upload();
await client.close();
