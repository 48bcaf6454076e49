// A small uPlot chart of the last minutes, in the colours of the page.
import { KEPT, spanOf } from "./history.js";
import { html, useEffect, useRef } from "./ui.js";
import uPlot from "./vendor/uplot.mjs";

const TOGETHER = "gapless";

/**
 * lines   [{values, colour, fill}], colours by the names of style.css
 * range   "share" for 0 to 1, else from 0 to a little over the highest value
 * axes    shows times, and values by `label`
 * at      called with the index under the pointer, or null; all charts of the page share it
 */
export function Chart({ time, lines, range, axes, label, height, at, theme }) {
  const frame = useRef(null);
  const plot = useRef(null);
  useEffect(() => {
    const colours = probe(frame.current);
    const options = optionsOf({ lines, range, axes, label, height, at, colours, width: frame.current.clientWidth });
    plot.current = new uPlot(options, dataOf(time, lines), frame.current);
    const observer = new ResizeObserver(([entry]) =>
      plot.current.setSize({ width: Math.floor(entry.contentRect.width), height }),
    );
    observer.observe(frame.current);
    return () => {
      observer.disconnect();
      plot.current.destroy();
    };
  }, [theme, height]);
  useEffect(() => {
    plot.current.setData(dataOf(time, lines));
  }, [time]);
  return html`<div class="chart" ref=${frame} aria-hidden="true"></div>`;
}

function dataOf(time, lines) {
  return [time, ...lines.map(({ values }) => values)];
}

/** Resolves a colour of the style sheet to one that a canvas takes. */
function probe(frame) {
  const element = document.createElement("i");
  frame.append(element);
  const resolve = (name) => {
    element.style.color = `var(--${name})`;
    return getComputedStyle(element).color;
  };
  const names = ["soft", "line", "s0", "s1", "s2", "s3", "idle"];
  const colours = Object.fromEntries(names.map((name) => [name, resolve(name)]));
  element.remove();
  return colours;
}

function optionsOf({ lines, range, axes, label, height, at, colours, width }) {
  const font = "11px system-ui, sans-serif";
  const grid = { stroke: colours.line, width: 1 };
  const common = { stroke: colours.soft, font, grid, ticks: { show: false } };
  return {
    width,
    height,
    padding: axes ? [8, 12, 0, 0] : [4, 1, 2, 1],
    legend: { show: false },
    cursor: { y: false, points: { size: 5 }, drag: { x: false, y: false }, sync: { key: TOGETHER } },
    hooks: { setCursor: [(plot) => at(plot.cursor.left >= 0 ? (plot.cursor.idx ?? null) : null)] },
    scales: {
      x: { time: false, range: ({ data }, _, newest) => [newest - spanOf(data[0]), newest] },
      y: { range: range === "share" ? [0, 1] : (_, __, highest) => [0, Math.max(highest * 1.15 || 0, 1e-6)] },
    },
    axes: axes
      ? [
          { ...common, size: 22, gap: 4, splits, values: (plot, marks) => marks.map((mark) => ago(plot, mark)) },
          { ...common, size: 44, gap: 6, space: 34, values: (_, marks) => marks.map(label) },
        ]
      : [{ show: false }, { show: false }],
    series: [
      {},
      ...lines.map(({ colour, fill }) => ({
        stroke: colours[colour],
        width: 1.5,
        fill: fill && faint(colours[colour]),
        points: { show: (plot, series) => alone(plot.data[series]), size: 3, width: 0, fill: colours[colour] },
      })),
    ],
  };
}

/** Marks up to now; the oldest edge has none, its place is the other axis's. */
function splits({ data, scales }) {
  const span = spanOf(data[0]);
  const part = span === KEPT ? 60 : span / 4;
  return Array.from({ length: span / part }, (_, parts) => scales.x.max - parts * part).reverse();
}

function ago(plot, mark) {
  const seconds = Math.round(plot.scales.x.max - mark);
  if (seconds === 0) return "now";
  return spanOf(plot.data[0]) === KEPT ? `−${seconds / 60} min` : `−${seconds} s`;
}

function faint(colour) {
  return colour.replace(/^rgb\((.*)\)$/, "rgba($1, 0.14)");
}

/** A value between two gaps has no line: it is shown as a point. */
function alone(values) {
  return values.filter((value) => value !== null).length < 2;
}
