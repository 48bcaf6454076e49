// A Chrome trace of the engine as runs with lanes, and the steps of it that are looked at.

export const LANES = ["host", "h2d", "compute", "d2h"];
const PREFILL = "prefill";
const LONGEST_SILENCE = 0.005; // seconds; where no lane does anything for longer, there was no work
const SILENT_STEPS = 2; // or for as long as so many steps

/** One run for each lookahead: {name, note, spans}; a span is {lane, name, step, slot, begin, end}, in seconds. */
export function runsOf(trace) {
  const runs = new Map();
  const lanes = new Map();
  const run = (pid) => {
    if (!runs.has(pid)) runs.set(pid, { name: `run ${pid}`, note: "", spans: [] });
    return runs.get(pid);
  };
  for (const event of trace.traceEvents) {
    if (event.ph !== "M") continue;
    if (event.name === "process_name") run(event.pid).name = event.args.name;
    if (event.name === "process_labels") run(event.pid).note = event.args.labels;
    if (event.name === "thread_name") lanes.set(`${event.pid} ${event.tid}`, event.args.name);
  }
  for (const { ph, pid, tid, ts, dur, name, args } of trace.traceEvents) {
    if (ph !== "X") continue;
    run(pid).spans.push({
      lane: lanes.get(`${pid} ${tid}`) ?? "",
      name: args?.name ?? name,
      step: args?.step ?? -1,
      slot: args?.slot ?? "",
      begin: ts / 1e6,
      end: (ts + dur) / 1e6,
    });
  }
  for (const each of runs.values()) each.spans.sort((one, other) => one.begin - other.begin);
  return [...runs.values()];
}

export function isWait(span) {
  return span.lane === "host" && (span.name === "collect" || span.name.startsWith("waited"));
}

/** The first compute span of each step, in order. */
function stagesOf(run) {
  const seen = new Set();
  return run.spans.filter((span) => {
    const first = span.lane === "compute" && span.step >= 0 && !seen.has(span.step);
    if (first) seen.add(span.step);
    return first;
  });
}

/** The last steps in a row, as many as asked for: none if there are fewer than two. A time without work ends a row. */
export function lastWindow(run, steps) {
  const stages = stagesOf(run);
  const begin = workBegan(run, stages);
  const row = stages.filter((stage) => stage.begin >= begin).slice(-(steps + 1));
  return row.length < 2 ? null : windowOf(run, row);
}

/** So many decode steps in a row that took the median time of all such; of several, those nearest to the middle. */
export function typicalWindow(run, steps) {
  const stages = stagesOf(run);
  let stretches = [[]];
  for (const stage of stages) {
    if (stage.name === PREFILL) stretches.push([]);
    else stretches.at(-1).push(stage);
  }
  stretches = stretches.filter((each) => each.length > 1);
  if (stretches.length === 0) stretches = [stages];
  const count = Math.min(steps, Math.max(...stretches.map((each) => each.length)) - 1);
  if (count < 1) return null;
  const rows = stretches.flatMap((each) =>
    each.slice(0, Math.max(0, each.length - count)).map((_, at) => each.slice(at, at + count + 1)),
  );
  const lengths = rows.map((row) => row.at(-1).begin - row[0].begin);
  const median = [...lengths].sort((one, other) => one - other)[Math.floor((lengths.length - 1) / 2)];
  const middle = (rows.length - 1) / 2;
  let chosen = lengths.indexOf(median);
  lengths.forEach((length, at) => {
    if (length === median && Math.abs(at - middle) < Math.abs(chosen - middle)) chosen = at;
  });
  return windowOf(run, rows[chosen]);
}

/** Where the last stretch began in which some lane was always at work. */
function workBegan(run, stages) {
  const gaps = stages.slice(1).map((stage, at) => stage.begin - stages[at].begin);
  const median = gaps.sort((one, other) => one - other)[Math.floor(gaps.length / 2)] ?? 0;
  const longest = Math.max(LONGEST_SILENCE, SILENT_STEPS * median);
  let began = run.spans[0]?.begin ?? 0;
  let reached = began;
  for (const { begin, end } of run.spans) {
    if (begin - reached > longest) began = begin;
    reached = Math.max(reached, end);
  }
  return began;
}

/** Of all stages but the last, which only ends it. All figures are over these steps. */
function windowOf(run, row) {
  const begin = row[0].begin;
  const end = row.at(-1).begin;
  if (end - begin < 1e-9) return null;
  const steps = row.slice(0, -1).map((stage) => stage.step);
  const spans = run.spans.filter((span) => span.end > begin && span.begin < end);
  const idle = idleGaps(spans, begin, end);
  const seconds = end - begin;
  return {
    name: run.name,
    note: run.note,
    steps,
    begin,
    end,
    seconds,
    spans,
    idle,
    stepSeconds: seconds / steps.length,
    idleShare: idle.reduce((sum, gap) => sum + gap.end - gap.begin, 0) / seconds,
    works: hostSeconds(run, steps, begin, end, false),
    waits: hostSeconds(run, steps, begin, end, true),
    rows: steps.map((step) => stepFigures(run, step)),
  };
}

function idleGaps(spans, begin, end) {
  const gaps = [];
  let reached = begin;
  for (const span of [...spans.filter((each) => each.lane === "compute"), { begin: end, end }]) {
    if (span.begin > reached) gaps.push({ lane: "compute", name: "idle", step: -1, slot: "", begin: reached, end: span.begin });
    reached = Math.max(reached, span.end);
  }
  return gaps;
}

/** What the host works for a step, or waits, on average: by the number of the step, wherever the host was with it. */
function hostSeconds(run, steps, begin, end, waiting) {
  const numbers = new Set(steps);
  let total = 0;
  for (const span of run.spans) {
    if (span.lane !== "host" || isWait(span) !== waiting) continue;
    if (numbers.has(span.step)) total += span.end - span.begin;
    else if (span.step < 0) total += Math.max(0, Math.min(span.end, end) - Math.max(span.begin, begin));
  }
  return total / steps.length;
}

/** Seconds of one step, by lane. */
function stepFigures(run, step) {
  const spans = run.spans.filter((span) => span.step === step);
  const sum = (which) => spans.filter(which).reduce((total, span) => total + span.end - span.begin, 0);
  return {
    step,
    slot: spans.find((span) => span.slot)?.slot ?? "",
    works: sum((span) => span.lane === "host" && !isWait(span)),
    waits: sum(isWait),
    h2d: sum((span) => span.lane === "h2d"),
    compute: sum((span) => span.lane === "compute"),
    d2h: sum((span) => span.lane === "d2h"),
  };
}
