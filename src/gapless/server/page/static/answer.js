// One answer of the model, as it comes.
import { stream } from "./api.js";
import { plural, rate } from "./format.js";
import { TokenReader } from "./tokens.js";

const ALTERNATIVES = 5;

/**
 * Asks, and fills the answer in: {text, thoughts, tokens, state, reason, error, count, ttft, tokensPerSecond}. `state`
 * is "waiting", "running", "stopped", "failed" or "done". `tell` is called when something has changed.
 */
export async function ask(answer, { model, messages, fields, logprobs }, tell, signal) {
  const reader = new TokenReader();
  const begun = performance.now();
  let first = 0;
  const body = {
    ...fields,
    model,
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...(logprobs ? { logprobs: true, top_logprobs: ALTERNATIVES } : {}),
  };
  try {
    for await (const { choices, usage } of stream("v1/chat/completions", body, signal)) {
      const [choice] = choices ?? [];
      const now = performance.now();
      if (choice) {
        const { content, reasoning_content: thoughts } = choice.delta ?? {};
        const entries = choice.logprobs?.content ?? [];
        if (content || thoughts || entries.length > 0) {
          first ||= now;
          answer.state = "running";
          answer.text += content ?? "";
          answer.thoughts += thoughts ?? "";
          answer.tokens.push(...reader.read(entries));
          answer.count += entries.length || 1;
        }
        answer.reason = choice.finish_reason ?? answer.reason;
      }
      answer.count = usage?.completion_tokens ?? answer.count;
      if (first) {
        answer.ttft = (first - begun) / 1e3;
        if (choice && answer.count > 1 && now > first) answer.tokensPerSecond = ((answer.count - 1) * 1e3) / (now - first);
      }
      tell();
    }
    answer.state = "done";
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
    answer.error = answer.state === "failed" ? error.message : "";
  }
  tell();
}

export function newAnswer() {
  return { role: "assistant", text: "", thoughts: "", tokens: [], state: "waiting", reason: "", error: "", count: 0 };
}

/** The figures of an answer in words. */
export function figures({ state, reason, count, ttft, tokensPerSecond }) {
  const parts = [];
  if (count) parts.push(plural(count, "token"));
  if (tokensPerSecond) parts.push(`${rate(tokensPerSecond)} tokens/s`);
  if (ttft) parts.push(`first after ${ttft.toFixed(2)} s`);
  if (state === "stopped") parts.push("stopped by you");
  if (state === "done" && reason === "length") parts.push("cut off by max tokens");
  return parts.join(" · ");
}
