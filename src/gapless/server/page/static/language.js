// Runs before the modules. In the locale C, Chromium tells a language that Intl refuses, and uPlot asks for it as it loads.
try {
  Intl.getCanonicalLocales(navigator.language);
} catch {
  Object.defineProperty(navigator, "language", { value: "en" });
}
