// The playground: a chat with the model, its parameters beside it.
import { askAgain } from "./api.js";
import { ask, figures, newAnswer } from "./answer.js";
import { checked, START, Settings } from "./settings.js";
import { Tokens } from "./tokens.js";
import { html, useEffect, useRef, useState } from "./ui.js";

const IDEAS = ["Why is the sky blue?", "Write a haiku about a river.", "Name three uses of a paper clip."];
const NEAR = 48; // pixels from the end within which the chat follows the answer

export function Playground({ models }) {
  const [turns, setTurns] = useState([]);
  const [draft, setDraft] = useState("");
  const [settings, setSettings] = useState(START);
  const [tinted, setTinted] = useState(true);
  const [said, setSaid] = useState("");
  const [, draw] = useState(0);
  const stop = useRef(null);
  const frame = useRef(0);
  const box = useRef(null);
  const log = useRef(null);
  const { fields, errors } = checked(settings);
  const model = settings.model ?? models[0];
  const busy = stop.current !== null;
  const valid = Object.keys(errors).length === 0;

  const redraw = () => {
    frame.current ||= requestAnimationFrame(() => {
      frame.current = 0;
      draw((number) => number + 1);
    });
  };
  const send = async (text, before = turns) => {
    if (busy || !valid || text.trim() === "") return;
    askAgain();
    const answer = newAnswer();
    const earlier = before.filter((turn) => turn.text !== "");
    const system = settings.system.trim() === "" ? [] : [{ role: "system", text: settings.system }];
    const asked = { role: "user", text };
    const messages = [...system, ...earlier, asked].map((turn) => ({ role: turn.role, content: turn.text }));
    const abort = new AbortController();
    stop.current = abort;
    setTurns([...before, asked, answer]);
    setDraft("");
    setSaid("The model answers.");
    await ask(answer, { model, messages, fields, logprobs: tinted }, redraw, abort.signal);
    if (stop.current !== abort) return; // cleared meanwhile
    stop.current = null;
    setSaid(answer.state === "failed" ? "" : `${answer.state === "stopped" ? "Stopped. " : ""}Answer: ${answer.text}`);
    redraw();
  };
  const clear = () => {
    stop.current?.abort();
    stop.current = null;
    setTurns([]);
    setSaid("The chat is empty.");
    box.current.focus();
  };
  const retry = () => {
    const asked = turns.at(-2);
    send(asked.text, turns.slice(0, -2));
  };
  useEffect(() => () => stop.current?.abort(), []);
  useEffect(() => {
    const { scrollHeight, scrollTop, clientHeight } = log.current;
    if (busy && scrollHeight - scrollTop - clientHeight < NEAR + clientHeight / 4) log.current.scrollTop = scrollHeight;
  });

  return html`<section class="card playground" id="playground" aria-labelledby="playground-title">
    <div class="card-head">
      <h2 id="playground-title">Playground</h2>
      <div class="actions">
        <label class="inline check" title="Asks for log probabilities and tints each token by its own">
          <input type="checkbox" checked=${tinted} onChange=${(event) => setTinted(event.target.checked)} />
          Probabilities
        </label>
        <button type="button" disabled=${turns.length === 0} onClick=${clear}>Clear</button>
      </div>
    </div>
    <div class="log" ref=${log} tabindex="0" role="region" aria-label="Chat">
      ${turns.length === 0 && html`<${Beginning} send=${send} ready=${model !== undefined} />`}
      ${turns.map((turn, index) =>
        turn.role === "user"
          ? html`<article class="turn user" key=${index} aria-label="You"><div class="text">${turn.text}</div></article>`
          : html`<${Answer} key=${index} answer=${turn} tinted=${tinted} retry=${index === turns.length - 1 ? retry : null} />`,
      )}
    </div>
    <p class="unseen" role="status">${said}</p>
    <form
      class="composer"
      onSubmit=${(event) => {
        event.preventDefault();
        send(draft);
      }}
    >
      <label class="unseen" for="draft">Message</label>
      <textarea
        id="draft"
        ref=${box}
        rows="2"
        placeholder="Message"
        value=${draft}
        onInput=${(event) => setDraft(event.target.value)}
        onKeyDown=${(event) => {
          if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
          event.preventDefault();
          send(draft);
        }}
      ></textarea>
      ${busy
        ? html`<button type="button" class="stop" onClick=${() => stop.current?.abort()}>Stop</button>`
        : html`<button type="submit" class="main" disabled=${!valid || draft.trim() === "" || !model}>Send</button>`}
    </form>
    <details class="parameters">
      <summary>
        Parameters${valid ? html`<span class="soft">${summary(fields, settings)}</span>` : html`<span class="error">one cannot be sent</span>`}
      </summary>
      <${Settings} model=${model} models=${models} settings=${settings} change=${setSettings} errors=${errors} />
    </details>
  </section>`;
}

function Beginning({ send, ready }) {
  return html`<div class="beginning">
    <p>Ask something, and watch the steps it takes.</p>
    <ul>
      ${IDEAS.map((idea) => html`<li><button type="button" disabled=${!ready} onClick=${() => send(idea, [])}>${idea}</button></li>`)}
    </ul>
  </div>`;
}

function Answer({ answer, tinted, retry }) {
  const { text, thoughts, tokens, state, error } = answer;
  const going = state === "waiting" || state === "running";
  return html`<article class=${`turn model ${going ? "going" : ""}`} aria-label="Model" aria-busy=${going}>
    ${thoughts &&
    html`<details class="thoughts" open=${text === ""}>
      <summary>Thoughts</summary>
      <div class="text">${thoughts}</div>
    </details>`}
    ${tinted && tokens.length > 0 ? html`<${Tokens} text=${text} tokens=${tokens} />` : html`<div class="text">${text}</div>`}
    ${error &&
    html`<p class="error" role="alert">
      ${error} ${retry && html`<button type="button" onClick=${retry}>Try again</button>`}
    </p>`}
    <p class="figures soft">${figures(answer) || (going ? "waiting for the first token" : "")}</p>
  </article>`;
}

/** What differs from the server's own parameters, in short. */
function summary(fields, settings) {
  const { stop, response_format: form, ...numbers } = fields;
  const parts = Object.entries(numbers).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
  if (settings.system.trim() !== "") parts.unshift("system message");
  if (stop) parts.push("stop strings");
  if (form) parts.push("JSON schema");
  return parts.join(", ");
}
