// The dashboard: what the engine does, over the last five minutes.
import { Chart } from "./chart.js";
import { count, known, milliseconds, NONE, percent, rate } from "./format.js";
import { html, useState } from "./ui.js";

const SMALL = 44;
const LARGE = 132;

/** history: of history.js; error: why there are no new figures. */
export function Dashboard({ history, stats, error, theme }) {
  const [index, setIndex] = useState(null);
  const { columns } = history;
  const at = index !== null && index < columns.time.length ? index : columns.time.length - 1;
  const value = (name) => columns[name][at] ?? null;
  const past = at < columns.time.length - 1;
  const seconds = past ? Math.round(columns.time.at(-1) - columns.time[at]) : 0;
  const tiles = tilesOf(value, stats, past);
  return html`<section class="dashboard" id="dashboard" aria-labelledby="dashboard-title">
    <div class="section-head">
      <h2 id="dashboard-title">Dashboard</h2>
      <p class="soft">${past ? `${seconds} s ago` : "the last five minutes, each second"}</p>
    </div>
    ${error && html`<p class="error" role="alert">${error}</p>`}
    <ul class="tiles">
      ${tiles.map(
        ({ name, title, hint, figure, unit, note, large, range, lines, label }) =>
          html`<li class=${large ? "card tile large" : "card tile"} key=${name}>
            <h3 title=${hint}>${title}</h3>
            <p class="figure"><b data-figure=${name}>${figure}</b>${unit && html`<span>${unit}</span>`}</p>
            <${Chart}
              time=${columns.time}
              lines=${lines.map((line) => ({ ...line, values: columns[line.column] }))}
              range=${range}
              axes=${large}
              label=${label}
              height=${large ? LARGE : SMALL}
              at=${setIndex}
              theme=${theme}
            />
            <p class="note">${note}</p>
          </li>`,
      )}
    </ul>
  </section>`;
}

function tilesOf(value, stats, past) {
  const total = (text) => (stats && !past ? text : "\u00a0");
  return [
    {
      name: "tokens",
      title: "Tokens per second",
      hint: "Generated, of all requests together",
      figure: rate(value("tokens")),
      unit: "tokens/s",
      note: total(`${count(stats?.generated_tokens)} since the start`),
      large: true,
      lines: [{ column: "tokens", colour: "s0", fill: true }],
      label: (mark) => count(mark),
    },
    {
      name: "busy",
      title: "Device busy",
      hint: "Time of the compute stream at work, of the time with work",
      figure: known(value("busy")) ? percent(value("busy")) : "idle",
      note: total(`${stats?.device ?? ""}${stats ? `, lookahead ${stats.lookahead}` : ""}`),
      large: true,
      range: "share",
      lines: [{ column: "busy", colour: "s2", fill: true }],
      label: (mark) => percent(mark, 0),
    },
    {
      name: "requests",
      title: "Requests",
      hint: "Running, and waiting for a row",
      figure: count(value("running")),
      unit: "running",
      note: two("waiting", count(value("waiting")), "s1"),
      lines: [
        { column: "running", colour: "s0" },
        { column: "waiting", colour: "s1" },
      ],
    },
    {
      name: "occupancy",
      title: "Batch occupancy",
      hint: "Rows in use, of all rows",
      figure: percent(value("occupancy")),
      note: `${count(value("running"))} of ${count(stats?.rows)} rows`,
      range: "share",
      lines: [{ column: "occupancy", colour: "s0", fill: true }],
    },
    {
      name: "kv",
      title: "KV cache in use",
      hint: "Blocks that requests hold, of all blocks",
      figure: percent(value("kv")),
      note: total(`${count(stats?.kv_blocks_used)} of ${count(stats?.kv_blocks)} blocks`),
      range: "share",
      lines: [{ column: "kv", colour: "s3", fill: true }],
    },
    {
      name: "ttft",
      title: "Time to first token",
      hint: "Median, and the 99th percentile",
      ...latency(value("ttft50"), value("ttft99")),
      lines: [
        { column: "ttft50", colour: "s0" },
        { column: "ttft99", colour: "s1" },
      ],
    },
    {
      name: "inter_token",
      title: "Between tokens",
      hint: "Median, and the 99th percentile",
      ...latency(value("inter50"), value("inter99")),
      lines: [
        { column: "inter50", colour: "s0" },
        { column: "inter99", colour: "s1" },
      ],
    },
    {
      name: "overshoot",
      title: "Overshoot",
      hint: "Rows computed for requests that had ended, of all rows, over the last minute",
      figure: percent(value("overshoot"), 2),
      note: total(`${count(stats?.overshoot_rows)} rows in all`),
      lines: [{ column: "overshoot", colour: "idle" }],
    },
    {
      name: "hits",
      title: "Prefix cache hits",
      hint: "Prompt tokens found in the cache, of all, over the last minute",
      figure: percent(value("hits"), 0),
      note: total(`${count(stats?.cached_tokens)} of ${count(stats?.prompt_tokens)} tokens`),
      range: "share",
      lines: [{ column: "hits", colour: "s2", fill: true }],
    },
    {
      name: "preemptions",
      title: "Preemptions",
      hint: "In the last minute",
      figure: count(value("preemptions")),
      unit: "a minute",
      note: total(`${count(stats?.preemptions)} in all`),
      lines: [{ column: "preemptions", colour: "idle" }],
    },
  ];
}

function latency(median, high) {
  const [figure, unit] = milliseconds(median).split(" ");
  return { figure, unit: unit && `${unit} p50`, note: two("p99", known(high) ? milliseconds(high) : NONE, "s1") };
}

/** The second line of a chart, named. */
function two(name, figure, colour) {
  return html`<i class=${`dot ${colour}`}></i>${name} <b>${figure}</b>`;
}
