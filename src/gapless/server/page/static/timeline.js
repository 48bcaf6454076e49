// The timeline: the last steps as they come, the switch of the lookahead, and the comparison.
import { get, post } from "./api.js";
import { compare, LOOKAHEADS } from "./compare.js";
import { milliseconds, percent, plural, rate } from "./format.js";
import { colourOf, Lanes, summary } from "./lanes.js";
import { usePoll } from "./poll.js";
import { isWait, lastWindow, runsOf } from "./trace.js";
import { html, useRef, useState } from "./ui.js";

const EVERY = 1000;
const STEPS = [4, 8, 16, 32];
const ANYTHING = "Point at a bar, or focus the picture and use the arrow keys.";

export function Timeline({ stats }) {
  const [steps, setSteps] = useState(matchMedia("(max-width: 560px)").matches ? 4 : 8);
  const [live, setLive] = useState(null); // {shown} or {error}
  const [paused, setPaused] = useState(false);
  const [held, setHeld] = useState(false);
  const [chosen, setChosen] = useState(null);
  const [wished, setWished] = useState(null); // a lookahead that was set and is not told back yet
  const [results, setResults] = useState(null);
  const [doing, setDoing] = useState("");
  const [error, setError] = useState("");
  const stop = useRef(null);
  const latest = useRef(null);
  latest.current = { paused: paused || held, lookahead: stats?.lookahead };

  usePoll(
    async () => {
      try {
        const trace = await get(`debug/timeline?steps=${steps + 8}`);
        const { paused: still, lookahead } = latest.current;
        if (still) return;
        const runs = runsOf(trace).filter((run) => run.spans.length > 0);
        const run = runs.find((each) => each.name === `lookahead ${lookahead}`);
        const shown = run && lastWindow(run, steps);
        setLive((before) => ({ shown: shown ?? before?.shown ?? null, error: "" }));
      } catch (failure) {
        setLive((before) => ({ shown: before?.shown ?? null, error: failure.message }));
      }
    },
    EVERY,
    !paused && !held && !doing && !results,
  );

  const lookahead = wished ?? stats?.lookahead;
  if (wished !== null && stats?.lookahead === wished) setWished(null);
  const set = async (to) => {
    setError("");
    setWished(to);
    try {
      await post("debug/lookahead", { lookahead: to });
    } catch (failure) {
      setWished(null);
      setError(failure.message);
    }
  };
  const start = async () => {
    const abort = new AbortController();
    stop.current = abort;
    setError("");
    setResults(null);
    setChosen(null);
    setDoing("Begins …");
    try {
      setResults(await compare(stats?.model, stats?.lookahead ?? 1, setDoing, abort.signal));
    } catch (failure) {
      if (failure.name !== "AbortError") setError(failure.message);
    }
    setDoing("");
  };

  const windows = results ? results.map(({ shown }) => shown) : live?.shown ? [live.shown] : [];
  const titles = windows.map((shown) => shown.name);
  const slots = [...new Set(windows.flatMap((shown) => shown.spans.map((span) => span.slot)))].filter(Boolean).sort();
  const trouble = error || (results ? "" : live?.error);
  return html`<section class="card timeline" id="timeline" aria-labelledby="timeline-title">
    <div class="card-head">
      <h2 id="timeline-title">Timeline</h2>
      <${LookaheadSwitch} lookahead=${lookahead} set=${set} disabled=${!stats || doing !== ""} />
      <div class="actions">
        ${!results &&
        html`<label class="inline">
            Steps
            <select value=${steps} onChange=${(event) => setSteps(Number(event.target.value))}>
              ${STEPS.map((each) => html`<option value=${each} selected=${each === steps}>${each}</option>`)}
            </select>
          </label>
          <button type="button" aria-pressed=${paused} onClick=${() => setPaused(!paused)}>Pause</button>`}
        ${results && html`<button type="button" onClick=${() => (setResults(null), setChosen(null))}>Back to live</button>`}
        ${doing
          ? html`<button type="button" onClick=${() => stop.current.abort()}>Cancel</button>`
          : html`<button type="button" class="main" disabled=${!stats} onClick=${start}>
              ${results ? "Compare again" : "Compare 0 and 1"}
            </button>`}
      </div>
    </div>
    <p class="status" role="status">${doing || (results ? verdict(results) : "")}</p>
    ${trouble && html`<p class="error" role="alert">${trouble}</p>`}
    ${windows.length === 0
      ? html`<p class="empty">No steps yet. Ask something in the playground, or compare the two lookaheads.</p>`
      : html`<div class=${doing ? "picture dim" : "picture"}>
          <div class="run-head">
            <span class="run-title">${titles[0]}</span>
            <span class="soft figures">${summary(windows[0])}</span>
          </div>
          <${Lanes}
            windows=${windows}
            titles=${titles}
            label=${`Timeline. ${windows.map((shown) => `${shown.name}: ${summary(shown)}`).join(". ")}. Arrow keys go from bar to bar.`}
            onSelect=${setChosen}
            onHold=${setHeld}
          />
          <div class="under">
            <${Legend} slots=${slots} />
            <p class="readout" aria-live="polite">${chosen ? details(chosen) : ANYTHING}</p>
          </div>
          <${Figures} windows=${windows} results=${results} />
        </div>`}
  </section>`;
}

function LookaheadSwitch({ lookahead, set, disabled }) {
  const choices = LOOKAHEADS.includes(lookahead) || lookahead === undefined ? LOOKAHEADS : [...LOOKAHEADS, lookahead];
  return html`<fieldset class="switch" disabled=${disabled} title="For everyone who uses this engine">
    <legend>Lookahead</legend>
    ${choices.map(
      (each) =>
        html`<label>
          <input type="radio" name="lookahead" value=${each} checked=${each === lookahead} onChange=${() => set(each)} />
          <span>${each}</span>
        </label>`,
    )}
  </fieldset>`;
}

function Legend({ slots }) {
  return html`<ul class="legend" aria-label="Colours">
    ${slots.map((slot) => html`<li><i class=${`mark ${colourOf(slot)}`}></i>slot ${slot}</li>`)}
    <li><i class="mark wait"></i>host waits</li>
    <li><i class="mark idle"></i>device idles</li>
  </ul>`;
}

function Figures({ windows, results }) {
  return html`<details class="figures-table">
    <summary>The figures as a table</summary>
    <div class="scroll" tabindex="0" role="region" aria-label="Figures of the timeline">
      <table>
        <caption>Over the steps drawn</caption>
        <thead>
          <tr>
            <th scope="col">run</th>
            ${results && html`<th scope="col">tokens/s</th>`}
            <th scope="col">steps</th>
            <th scope="col">a step takes</th>
            <th scope="col">compute idle</th>
            <th scope="col">host works, a step</th>
            <th scope="col">host waits, a step</th>
          </tr>
        </thead>
        <tbody>
          ${windows.map(
            (shown, index) =>
              html`<tr>
                <th scope="row">${shown.name}</th>
                ${results && html`<td>${rate(results[index].tokensPerSecond)}</td>`}
                <td>${shown.steps[0]} to ${shown.steps.at(-1)}</td>
                <td>${milliseconds(shown.stepSeconds)}</td>
                <td>${percent(shown.idleShare)}</td>
                <td>${milliseconds(shown.works)}</td>
                <td>${milliseconds(shown.waits)}</td>
              </tr>`,
          )}
        </tbody>
      </table>
      ${windows.map(
        (shown) =>
          html`<table>
            <caption>Steps at ${shown.name}</caption>
            <thead>
              <tr>
                ${["step", "slot", "host works", "host waits", "H2D", "compute", "D2H"].map((name) => html`<th scope="col">${name}</th>`)}
              </tr>
            </thead>
            <tbody>
              ${shown.rows.map(
                (row) =>
                  html`<tr>
                    <th scope="row">${row.step}</th>
                    <td>${row.slot}</td>
                    ${[row.works, row.waits, row.h2d, row.compute, row.d2h].map((seconds) => html`<td>${milliseconds(seconds)}</td>`)}
                  </tr>`,
              )}
            </tbody>
          </table>`,
      )}
    </div>
  </details>`;
}

function details({ span, shown }) {
  const lane = { host: "host", h2d: "H2D", compute: "compute", d2h: "D2H" }[span.lane];
  const what = [
    `${lane}: ${span.name}${isWait(span) ? ", the host waits" : ""}`,
    span.step >= 0 ? `step ${span.step}` : "",
    span.slot ? `slot ${span.slot}` : "",
    milliseconds(span.end - span.begin),
    `from ${((span.begin - shown.begin) * 1e3).toFixed(3)} ms on`,
  ];
  return what.filter(Boolean).join(" · ");
}

/** The comparison in one sentence, as measured. */
function verdict([zero, one]) {
  const ratio = one.tokensPerSecond / zero.tokensPerSecond;
  return (
    `${plural(one.tokens, "token")} each: ${rate(zero.tokensPerSecond)} tokens/s at lookahead 0, ` +
    `${rate(one.tokensPerSecond)} at 1, ${ratio.toFixed(2)} times as many. ` +
    `Compute idle ${percent(zero.shown.idleShare)} and ${percent(one.shown.idleShare)}. Each the better of two runs.`
  );
}
