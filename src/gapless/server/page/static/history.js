// The figures of the last minutes, from what the engine counts.

export const KEPT = 300; // seconds
const RECENT = 60; // seconds that shares of rare events are taken over
const SEVERAL_STEPS = 5; // seconds that the busy share is taken over: both its times are counted when a step ends
const LONGEST_GAP = 3.5; // seconds between two samples that are drawn as one line

/** Columns by name, each as long as `time`; null where there is nothing to show. */
export const COLUMNS = [
  "time",
  "tokens",
  "busy",
  "running",
  "waiting",
  "occupancy",
  "kv",
  "ttft50",
  "ttft99",
  "inter50",
  "inter99",
  "overshoot",
  "hits",
  "preemptions",
];

/** Seconds that charts show: what there is, in round spans up to KEPT. */
export function spanOf(time) {
  const age = time.length > 0 ? time.at(-1) - time[0] : 0;
  return [60, 120].find((span) => age <= span) ?? KEPT;
}

export function emptyHistory() {
  return { samples: [], columns: Object.fromEntries(COLUMNS.map((name) => [name, []])) };
}

/** A new history with one more sample, without what is older than KEPT. */
export function grown(history, stats) {
  const before = history.samples.at(-1);
  if (before && stats.time <= before.time) return history;
  const restarted = before && stats.steps < before.steps;
  const samples = [...(restarted ? [] : history.samples), stats].filter(({ time }) => time > stats.time - KEPT);
  const rows = [];
  if (before && (restarted || stats.time - before.time > LONGEST_GAP)) rows.push({ time: (stats.time + before.time) / 2 });
  rows.push(rowOf(samples, restarted ? null : before, stats));
  const first = history.columns.time.findIndex((time) => time > stats.time - KEPT);
  const columns = {};
  for (const name of COLUMNS) {
    const kept = first < 0 ? [] : history.columns[name].slice(first);
    columns[name] = [...kept, ...rows.map((row) => row[name] ?? null)];
  }
  return { samples, columns };
}

function rowOf(samples, before, now) {
  const recent = samples.find(({ time }) => time >= now.time - RECENT) ?? now;
  const lately = samples.find(({ time }) => time >= now.time - SEVERAL_STEPS) ?? now;
  const since = (name, other = recent) => now[name] - other[name];
  const tracked = before && now.time - before.time <= LONGEST_GAP;
  return {
    time: now.time,
    tokens: tracked ? since("generated_tokens", before) / (now.time - before.time) : null,
    busy: tracked ? share(since("busy_seconds", lately), since("active_seconds", lately)) : null,
    running: now.running,
    waiting: now.waiting,
    occupancy: share(now.running, now.rows),
    kv: share(now.kv_blocks_used, now.kv_blocks),
    ttft50: now.latency?.ttft?.p50,
    ttft99: now.latency?.ttft?.p99,
    inter50: now.latency?.inter_token?.p50,
    inter99: now.latency?.inter_token?.p99,
    overshoot: share(since("overshoot_rows"), since("overshoot_rows") + since("generated_tokens")),
    hits: share(since("cached_tokens"), since("prompt_tokens")),
    preemptions: since("preemptions"),
  };
}

function share(part, whole) {
  return whole > 1e-6 ? Math.min(part / whole, 1) : null;
}
