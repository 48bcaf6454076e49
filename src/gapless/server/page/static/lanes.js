// Windows of runs one above the other on one time scale: host, H2D, compute and D2H, slots in colours, idling hatched.
import { milliseconds, percent, plural } from "./format.js";
import { isWait } from "./trace.js";
import { html, useEffect, useRef, useState } from "./ui.js";

const SHOWN = { host: "host", h2d: "H2D", compute: "compute", d2h: "D2H" };
const HEIGHTS = { host: 26, h2d: 12, compute: 34, d2h: 12 };
const GAP = 6;
const RIGHT = 16;
const HEAD = 8;
const BLOCK_GAP = 44;
const FOOT = 24;
const THINNEST = 1.4;
const LETTER = 6.6; // width of one at 11 px
const COLOURS = 4; // more slots share them
const LANE_NAMES = Object.keys(SHOWN);
const LANES_HEIGHT = LANE_NAMES.reduce((sum, lane) => sum + HEIGHTS[lane] + GAP, 0) - GAP;

export function summary(shown) {
  return (
    `${plural(shown.steps.length, "step")} in ${milliseconds(shown.seconds)}: ` +
    `${milliseconds(shown.stepSeconds)} a step, compute idle ${percent(shown.idleShare)}`
  );
}

export function colourOf(slot) {
  return slot ? `s${(slot.charCodeAt(0) - 65) % COLOURS}` : "plain";
}

/**
 * The picture of some windows; arrow keys go from span to span. `onSelect` gets {span, shown} of the one under the
 * pointer, or null; `onHold` whether somebody is looking at one, when nothing may move.
 */
export function Lanes({ windows, label, titles, onSelect, onHold }) {
  const frame = useRef(null);
  const [width, setWidth] = useState(0);
  const [selected, setSelected] = useState(null);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(frame.current);
    return () => observer.disconnect();
  }, []);
  const choose = (span, shown) => {
    setSelected(span);
    onSelect(span && { span, shown });
  };
  const length = Math.max(...windows.map((shown) => shown.seconds));
  const left = width < 480 ? 64 : 70;
  const place = (shown, begin, end) => {
    const [from, to] = [begin, end].map((at) => {
      const inside = Math.min(Math.max(at, shown.begin), shown.end) - shown.begin;
      return left + ((width - left - RIGHT) * inside) / length;
    });
    return [from, Math.max(to - from, THINNEST)];
  };
  const height = HEAD + windows.length * LANES_HEIGHT + (windows.length - 1) * BLOCK_GAP + FOOT;
  const draws = { place, selected, choose, left };
  return html`<div
    class="lanes"
    ref=${frame}
    tabindex="0"
    role="application"
    aria-roledescription="timeline"
    aria-label=${label}
    onKeyDown=${(event) => travel(event, windows, selected, choose)}
    onFocus=${() => onHold(true)}
    onBlur=${() => (onHold(false), choose(null))}
    onPointerEnter=${() => onHold(true)}
    onPointerLeave=${() => (onHold(false), choose(null))}
  >
    ${width > 0 &&
    html`<svg width=${width} height=${height} viewBox="0 0 ${width} ${height}" aria-hidden="true">
      ${patterns}
      <${Axis} length=${length} left=${left} width=${width} y=${height - FOOT} />
      ${windows.map((shown, index) => {
        const top = HEAD + index * (LANES_HEIGHT + BLOCK_GAP);
        return html`<g key=${shown.name}>
          ${titles &&
          index > 0 &&
          html`<text class="run-name" x="0" y=${top - 15}>${titles[index]}</text>
            <text class="soft far" x=${width - RIGHT} y=${top - 15}>${width < 560 ? `idle ${percent(shown.idleShare)}` : summary(shown)}</text>`}
          <${Block} shown=${shown} top=${top} length=${length} width=${width} ...${draws} />
        </g>`;
      })}
    </svg>`}
  </div>`;
}

const patterns = html`<defs>
  <pattern id="idles" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
    <path class="idle-line" d="M0 0V6" />
  </pattern>
  <pattern id="waits" width="5" height="5" patternUnits="userSpaceOnUse">
    <circle class="wait-dot" cx="1.4" cy="1.4" r="0.9" />
  </pattern>
</defs>`;

function Block({ shown, top, length, left, width, place, selected, choose }) {
  let y = top;
  const lanes = LANE_NAMES.map((lane) => {
    const at = y;
    y += HEIGHTS[lane] + GAP;
    const spans = shown.spans.filter((span) => span.lane === lane && span.end > span.begin);
    const shapes = lane === "compute" ? [...shown.idle, ...spans] : spans;
    return html`<g key=${lane}>
      <text class="soft far" x=${left - 10} y=${at + HEIGHTS[lane] / 2 + 4}>${SHOWN[lane]}</text>
      <rect class="track" x=${left} y=${at} width=${place(shown, shown.begin, shown.end)[1]} height=${HEIGHTS[lane]} rx="2" />
      ${shapes.map((span) => {
        const [x, wide] = place(shown, span.begin, span.end);
        const idle = span.name === "idle" && span.step < 0;
        return html`<rect
          class=${`span ${idle ? "idle" : isWait(span) ? "wait" : colourOf(span.slot)} ${same(span, selected) ? "selected" : ""}`}
          fill=${idle ? "url(#idles)" : isWait(span) ? "url(#waits)" : undefined}
          x=${x.toFixed(2)}
          y=${at}
          width=${wide.toFixed(2)}
          height=${HEIGHTS[lane]}
          rx="2"
          onPointerEnter=${() => choose(span, shown)}
        />`;
      })}
      ${names(shapes, shown, at, HEIGHTS[lane], place)}
    </g>`;
  });
  const [end] = place(shown, shown.end, shown.end);
  const short = shown.seconds < length * 0.999 && end < width;
  return html`${lanes}${short && html`<path class="end" d=${`M${end} ${top - 4}V${y - GAP + 4}`} />`}`;
}

/** One name for the spans of a step that follow each other, where there is room for it. */
function names(spans, shown, y, height, place) {
  if (height < 20) return null;
  const groups = [];
  for (const span of spans) {
    if (isWait(span)) continue;
    const last = groups.at(-1);
    if (last && span.step >= 0 && last.step === span.step && span.begin - last.end < 1e-5) last.end = span.end;
    else groups.push({ ...span });
  }
  return groups.map((group) => {
    const [x, room] = place(shown, group.begin, group.end);
    const idle = group.step < 0;
    const texts = idle
      ? [`idle ${milliseconds(group.end - group.begin)}`, "idle"]
      : height > 30
        ? [`step ${group.step}`, `${group.step}`]
        : [`${group.step}`];
    const fitting = texts.find((text) => (text.length + 1) * LETTER < room);
    return (
      fitting &&
      html`<text class=${idle ? "red" : "on"} x=${(x + room / 2).toFixed(1)} y=${y + height / 2 + 4}>${fitting}</text>`
    );
  });
}

function Axis({ length, left, width, y }) {
  const wanted = Math.max(3, Math.floor((width - left) / 110));
  const rough = length / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const tick = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const digits = Math.max(0, -Math.floor(Math.log10(tick * 1e3) + 1e-9));
  const marks = Array.from({ length: Math.floor(length / tick + 1e-9) + 1 }, (_, number) => number * tick);
  return marks.map((at) => {
    const x = left + ((width - left - RIGHT) * at) / length;
    const text = `${(at * 1e3).toFixed(digits)}${at === 0 ? " ms" : ""}`;
    return html`<path class="grid" d=${`M${x.toFixed(1)} ${HEAD - 4}V${y + 4}`} />
      <text class="soft mid" x=${x.toFixed(1)} y=${y + 18}>${text}</text>`;
  });
}

function same(one, other) {
  if (other === null || one.lane !== other.lane || one.name !== other.name || one.step !== other.step) return false;
  return one.step >= 0 || one.begin === other.begin; // the next trace may count its time from elsewhere
}

/** Left and right along a lane, up and down to the nearest span of the next one, over all windows. */
function travel(event, windows, selected, choose) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key === "Escape") choose(null);
  if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const rows = windows.flatMap((shown) =>
    LANE_NAMES.map((lane) => ({
      shown,
      spans: [...(lane === "compute" ? shown.idle : []), ...shown.spans]
        .filter((span) => span.lane === lane && span.end > span.begin)
        .sort((one, other) => one.begin - other.begin),
    })),
  ).filter((row) => row.spans.length > 0);
  const row = rows.findIndex(({ spans }) => spans.some((span) => same(span, selected)));
  if (row < 0) {
    choose(rows[0]?.spans[0] ?? null, rows[0]?.shown);
    return;
  }
  const [along, across] = moves[event.key];
  if (along) {
    const { spans, shown } = rows[row];
    const at = spans.findIndex((span) => same(span, selected)) + along;
    if (spans[at]) choose(spans[at], shown);
  } else if (rows[row + across]) {
    const { spans, shown } = rows[row + across];
    const offset = selected.begin - rows[row].shown.begin;
    const distance = (span) => Math.abs(span.begin - shown.begin - offset);
    choose(spans.reduce((best, span) => (distance(span) < distance(best) ? span : best)), shown);
  }
}
