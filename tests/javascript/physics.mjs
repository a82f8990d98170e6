// Plays given actions from a given state, and prints each step:
// node physics.mjs MODULE STATE ACTIONS

const [module, state, actions] = process.argv.slice(2);
const { CartPole } = await import(module);
const cartpole = new CartPole();
cartpole.reset({ state: JSON.parse(state) });
const steps = JSON.parse(actions).map((action) => {
  const { reward, terminated, truncated } = cartpole.step(action);
  return { state: cartpole.state, reward, terminated, truncated };
});
console.log(JSON.stringify(steps));
