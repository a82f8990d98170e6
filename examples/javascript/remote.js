// Plays CartPole and asks a policy server for every action.
//
//   node remote.js --server localhost:9900 --episodes 100 --envs 4

import { CartPole } from './cartpole.js';
import { options } from './command.js';
import { PolicyClient, SessionLost } from './policy_client.js';

/** A CartPole and its next row for the server. */
class Episode {
  constructor(number) {
    this.cartpole = new CartPole();
    this.total = 0;
    this.row = {
      episode: number,
      step: 0,
      reward: 0,
      status: 'STEP_STATUS_RUNNING',
      observation: this.cartpole.reset(),
    };
  }

  get over() {
    return this.row.status !== 'STEP_STATUS_RUNNING';
  }

  /** Does what the policy says; the next row tells what came of it. */
  step(action) {
    const { observation, reward, terminated, truncated } = this.cartpole.step(action);
    this.total += reward;
    this.row.step += 1;
    this.row.reward = reward;
    this.row.observation = observation;
    if (truncated) this.row.status = 'STEP_STATUS_TRUNCATED';
    if (terminated) this.row.status = 'STEP_STATUS_TERMINATED';
  }

  /** Goes on under another number where the server has forgotten the first one. */
  resume(number) {
    Object.assign(this.row, { episode: number, step: 0, reward: 0 });
    return { episode: number, resumed: true };
  }
}

const { envs, episodes, ...where } = options({ envs: 1, episodes: 100 });
const client = await PolicyClient.open({ ...where, mode: 'INFERENCE_MODE_REMOTE' });
console.log(`connected to ${where.server}, policy version ${client.version}`);

let left = episodes; // to be started
const start = () => (left-- > 0 ? [new Episode(client.nextEpisode())] : []);
let playing = Array.from({ length: envs }, start).flat();

/** Sends everyone's rows: one message. */
async function act(starts = []) {
  try {
    return await client.act(
      playing.map((episode) => episode.row),
      starts,
    );
  } catch (error) {
    if (!(error instanceof SessionLost)) throw error;
    console.log(error.message);
    return act(playing.map((episode) => episode.resume(client.nextEpisode())));
  }
}

while (playing.length > 0) {
  const actions = await act();
  playing = playing.flatMap((episode, i) => {
    if (!episode.over) {
      episode.step(actions[i]);
      return [episode];
    }
    console.log(
      `episode ${episode.row.episode}: return ${episode.total}, policy version ${client.version}`,
    );
    return start();
  });
}
await client.close();
