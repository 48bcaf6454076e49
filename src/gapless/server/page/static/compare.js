// The same load at lookahead 0 and at lookahead 1, in turns.
import { get, post, randomWord } from "./api.js";
import { runsOf, typicalWindow } from "./trace.js";

const TOPICS = ["rain", "a bridge", "bread", "the moon", "a train", "salt", "a clock", "snow"];
const LOAD = { max_tokens: 48, ignore_eos: true, seed: 7, temperature: 0.8 };
const KEPT = 40; // steps of a run that are looked at for typical ones
const DRAWN = 4;
const LEASE = 120; // seconds after which the server sets the old lookahead again, if this page is gone
const ROUNDS = 2; // the better one counts: a neighbour who is busy for a moment shall not decide

export const LOOKAHEADS = [0, 1];

/**
 * Returns for each lookahead its better run: {lookahead, tokensPerSecond, tokens, shown}. The engine is left as it was.
 * `tell` gets what goes on. Throws what a call throws.
 */
export async function compare(model, lookahead, tell, signal) {
  const best = [];
  const lease = randomWord();
  try {
    for (let round = 1; round <= ROUNDS; round++) {
      for (const [index, each] of LOOKAHEADS.entries()) {
        tell(`Round ${round} of ${ROUNDS}: ${TOPICS.length} answers of ${LOAD.max_tokens} tokens at lookahead ${each} …`);
        const measured = await measure(model, each, lease, signal);
        if (!(best[index]?.tokensPerSecond >= measured.tokensPerSecond)) best[index] = measured;
      }
    }
    return best;
  } finally {
    // ends the lease: the server goes back to what it had before
    await post("debug/lookahead", { lookahead, seconds: 0.001, lease }).catch(() => {});
  }
}

async function measure(model, lookahead, lease, signal) {
  await post("debug/lookahead", { lookahead, seconds: LEASE, lease }, signal);
  await run(model, 2, signal); // what is done once, is done then
  await post("debug/lookahead", { lookahead, seconds: LEASE, lease }, signal);
  const begun = performance.now();
  const tokens = await run(model, LOAD.max_tokens, signal);
  const seconds = (performance.now() - begun) / 1e3;
  if ((await get("debug/stats", signal)).lookahead !== lookahead)
    throw new Error(`The lookahead did not stay at ${lookahead}: somebody set another one, or the answers took too long.`);
  const runs = runsOf(await get(`debug/timeline?steps=${KEPT}`, signal));
  const found = runs.find((kept) => kept.name === `lookahead ${lookahead}`);
  const shown = found && typicalWindow(found, DRAWN);
  if (!shown) throw new Error("The server keeps no timeline.");
  return { lookahead, tokensPerSecond: tokens / seconds, tokens, shown };
}

/** One request with all prompts, since a browser opens few connections. No run may find another's prompts cached. */
async function run(model, tokens, signal) {
  const prompt = TOPICS.map((topic) => `A short story about ${topic}.\n\n`);
  const body = { ...LOAD, model, prompt, max_tokens: tokens, cache_salt: randomWord() };
  return (await post("v1/completions", body, signal)).usage.completion_tokens;
}
