// Figures as text.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const NONE = "–";

export function known(value) {
  return value !== null && value !== undefined && Number.isFinite(value);
}

/** Three significant digits or so; from ten seconds on in seconds. */
export function milliseconds(seconds) {
  if (!known(seconds)) return NONE;
  const value = seconds * 1e3;
  if (value >= 1e4) return `${seconds.toFixed(1)} s`;
  if (value >= 100) return `${value.toFixed(0)} ms`;
  return `${value.toFixed(value >= 10 ? 1 : value >= 1 ? 2 : 3)} ms`;
}

export function percent(share, digits = 1) {
  return known(share) ? `${(share * 100).toFixed(digits)} %` : NONE;
}

/** A probability, with digits where it is near 0. */
export function probability(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return percent(share, share < 0.1 || share > 0.995 ? 1 : 0);
}

export function count(value) {
  return known(value) ? whole.format(value) : NONE;
}

/** Tokens per second. */
export function rate(value) {
  if (!known(value)) return NONE;
  return value >= 100 ? whole.format(value) : value.toFixed(value >= 10 ? 1 : 2);
}

export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** Letters that would not be seen as marks that are. */
export function visible(text) {
  if (text === "") return "(nothing)";
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}
