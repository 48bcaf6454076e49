// The text of an answer, token by token, tinted by how likely the model found each.
import { probability, visible } from "./format.js";
import { Component, html, useEffect, useLayoutEffect, useRef, useState } from "./ui.js";

const BLOCK = 40; // tokens that are compared as one when more come
const LEVELS = [0.5, 0.2, 0.05, 0.01]; // of probability; below the last one the tint is strongest

/** Entries of `logprobs.content` as {text, probability, top}, where bytes of a letter may come in several tokens. */
export class TokenReader {
  #decoder = new TextDecoder();

  read(entries) {
    return entries.map(({ token, bytes, logprob, top_logprobs: top = [] }) => ({
      text: bytes ? this.#decoder.decode(Uint8Array.from(bytes), { stream: true }) : token,
      token,
      probability: Math.exp(logprob),
      top: top.map((other) => ({ token: other.token, probability: Math.exp(other.logprob) })),
    }));
  }
}

/** The tokens that make up `text`, cut off where it ends: of a stop string no part is shown. */
export function pieces(text, tokens) {
  const shown = [];
  let at = 0;
  for (const token of tokens) {
    if (at >= text.length) break;
    if (!text.startsWith(token.text.slice(0, text.length - at), at)) break;
    const part = token.text.slice(0, text.length - at);
    if (part !== "") shown.push({ ...token, text: part });
    at += part.length;
  }
  return { shown, rest: text.slice(at) };
}

function level(probability) {
  const found = LEVELS.findIndex((least) => probability >= least);
  return found < 0 ? LEVELS.length : found;
}

export function Tokens({ text, tokens }) {
  const { shown, rest } = pieces(text, tokens);
  const [at, setAt] = useState(0); // the token that Tab reaches
  const [open, setOpen] = useState(null);
  const group = useRef(null);
  const choose = (index) => {
    setAt(index);
    setOpen(index);
    group.current.querySelector(`[data-at="${index}"]`)?.focus();
  };
  const onKeyDown = (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: shown.length - 1 }[event.key];
    if (event.key === "Escape") setOpen(null);
    if (to === undefined || !shown[to]) return;
    event.preventDefault();
    choose(to);
  };
  const hit = (event) => event.target.closest?.("[data-at]")?.dataset.at;
  const enter = (event) => hit(event) !== undefined && setOpen(Number(hit(event)));
  const focus = (event) => {
    if (hit(event) === undefined) return;
    setAt(Number(hit(event)));
    setOpen(Number(hit(event)));
  };
  const blocks = Math.ceil(shown.length / BLOCK);
  return html`<div
      class="text tokens"
      role="group"
      aria-label="The answer's tokens; arrow keys go from one to the next"
      ref=${group}
      onKeyDown=${onKeyDown}
      onPointerOver=${enter}
      onPointerLeave=${() => setOpen(null)}
      onFocusIn=${focus}
      onFocusOut=${() => setOpen(null)}
    >
      ${Array.from({ length: blocks }, (_, block) => {
        const from = block * BLOCK;
        const part = shown.slice(from, from + BLOCK);
        const inside = (index) => (index !== null && index >= from && index < from + BLOCK ? index : null);
        return html`<${Block} key=${block} from=${from} part=${part} at=${inside(at)} open=${inside(open)} />`;
      })}${rest}
    </div>
    ${open !== null && shown[open] && html`<${Alternatives} token=${shown[open]} index=${open} group=${group} />`}`;
}

class Block extends Component {
  shouldComponentUpdate(next) {
    const { part, at, open } = this.props;
    return part.length !== next.part.length || at !== next.at || open !== next.open || part.at(-1)?.text !== next.part.at(-1)?.text;
  }

  render({ part, from, at, open }) {
    return part.map(
      (token, index) =>
        html`<span
          key=${index}
          class=${`token p${level(token.probability)}`}
          role="button"
          data-at=${from + index}
          tabindex=${at === from + index ? 0 : -1}
          aria-label=${`${visible(token.text)}, ${probability(token.probability)}`}
          aria-describedby=${open === from + index ? "alternatives" : undefined}
          >${token.text}</span
        >`,
    );
  }
}

/** What else the model might have said there. */
function Alternatives({ token, index, group }) {
  const panel = useRef(null);
  useLayoutEffect(() => {
    const anchor = group.current.querySelector(`[data-at="${index}"]`)?.getClientRects()[0];
    if (!anchor) return;
    const { offsetWidth: width, offsetHeight: height } = panel.current;
    const left = Math.max(8, Math.min(anchor.left, document.documentElement.clientWidth - width - 8));
    const below = anchor.bottom + 6 + height < innerHeight;
    panel.current.style.left = `${left}px`;
    panel.current.style.top = `${below ? anchor.bottom + 6 : anchor.top - height - 6}px`;
  });
  useEffect(() => {
    const hide = () => panel.current && (panel.current.hidden = true);
    addEventListener("scroll", hide, { capture: true, once: true });
    return () => removeEventListener("scroll", hide, { capture: true });
  }, [index]);
  const among = token.top.some((other) => other.token === token.token);
  const rows = among ? token.top : [...token.top, { token: token.token, probability: token.probability }];
  return html`<div class="alternatives" id="alternatives" role="tooltip" ref=${panel} key=${index}>
    <ul>
      ${rows.map(
        (other) =>
          html`<li class=${other.token === token.token ? "taken" : ""}>
            <code>${visible(other.token)}</code>
            <meter min="0" max="1" value=${other.probability} aria-hidden="true"></meter>
            <span>${probability(other.probability)}</span>
          </li>`,
      )}
    </ul>
  </div>`;
}
