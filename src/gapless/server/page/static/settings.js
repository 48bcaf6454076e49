// The parameters of a chat: the form, and what of it goes into a request. What is left empty is the server's choice.
import { html } from "./ui.js";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, hint: "0 takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, hint: "The likeliest tokens that reach this probability" },
  { name: "top_k", label: "Top k", min: 0, whole: true, hint: "So many likeliest tokens; 0: all" },
  { name: "min_p", label: "Min p", min: 0, max: 1, hint: "At least this part of the likeliest's probability" },
  { name: "max_tokens", label: "Max tokens", min: 1, whole: true, hint: "The most tokens of an answer" },
  { name: "seed", label: "Seed", whole: true, hint: "The same seed, the same answer" },
  { name: "repetition_penalty", label: "Repetition", min: 0, max: 10, hint: "Above 1: less of what was said" },
  { name: "presence_penalty", label: "Presence", min: -2, max: 2, hint: "Against tokens the answer has" },
  { name: "frequency_penalty", label: "Frequency", min: -2, max: 2, hint: "As often as the answer has them" },
];
const INTEGER = /^[+-]?\d+$/;

export const START = { system: "", stop: "", schema: "", temperature: "0.7", max_tokens: "256" };

/** Of the form as it is: {fields} for the request, {errors} by name. */
export function checked(settings) {
  const fields = {};
  const errors = {};
  for (const { name, label, min = -Infinity, max = Infinity, whole } of NUMBERS) {
    const text = (settings[name] ?? "").trim();
    if (text === "") continue;
    const value = Number(text);
    if (!Number.isFinite(value) || (whole && !INTEGER.test(text))) {
      errors[name] = `${label} is ${whole ? "a whole number" : "a number"}`;
    } else if (value < min || value > max) {
      errors[name] = `${label} is ${min}${max === Infinity ? " or more" : ` to ${max}`}`;
    } else if (whole && !Number.isSafeInteger(value)) {
      errors[name] = `${label} is too large for this page`;
    } else {
      fields[name] = value;
    }
  }
  const stops = settings.stop.split("\n").filter((line) => line !== "");
  if (stops.length > 0) fields.stop = stops.map(unescaped);
  if (settings.schema.trim() !== "") {
    try {
      const schema = JSON.parse(settings.schema);
      fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
    } catch (error) {
      errors.schema = `Not JSON: ${error.message}`;
    }
  }
  return { fields, errors };
}

function unescaped(line) {
  return line.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
}

export function Settings({ model, models, settings, change, errors }) {
  const set = (name) => (event) => change({ ...settings, [name]: event.target.value });
  return html`<div class="settings">
    <label class="field wide">
      <span>Model</span>
      ${models.length > 1
        ? html`<select value=${model} onChange=${set("model")}>
            ${models.map((each) => html`<option value=${each} selected=${each === model}>${each}</option>`)}
          </select>`
        : html`<input type="text" readonly value=${model ?? ""} />`}
    </label>
    <label class="field wide">
      <span>System message</span>
      <textarea rows="2" value=${settings.system} onInput=${set("system")}></textarea>
    </label>
    <div class="numbers">
      ${NUMBERS.map(
        ({ name, label, hint, min, max, whole }) =>
          html`<label class="field" title=${hint}>
            <span>${label}</span>
            <input
              type="number"
              inputmode=${whole ? "numeric" : "decimal"}
              step=${whole ? 1 : "any"}
              min=${min}
              max=${max}
              name=${name}
              placeholder="default"
              value=${settings[name] ?? ""}
              aria-invalid=${name in errors ? "true" : undefined}
              aria-describedby=${name in errors ? "settings-errors" : undefined}
              onInput=${set(name)}
            />
          </label>`,
      )}
    </div>
    <label class="field wide">
      <span>Stop strings, one a line (\\n is a line break)</span>
      <textarea rows="1" class="code" value=${settings.stop} onInput=${set("stop")}></textarea>
    </label>
    <label class="field wide">
      <span>JSON schema of the answer</span>
      <textarea
        rows="3"
        class="code"
        name="schema"
        spellcheck=${false}
        placeholder='{"type": "object", "properties": {…}}'
        value=${settings.schema}
        aria-invalid=${"schema" in errors ? "true" : undefined}
        aria-describedby=${"schema" in errors ? "settings-errors" : undefined}
        onInput=${set("schema")}
      ></textarea>
    </label>
    <div id="settings-errors" role="status">
      ${Object.values(errors).map((message) => html`<p class="error">${message}</p>`)}
    </div>
  </div>`;
}
