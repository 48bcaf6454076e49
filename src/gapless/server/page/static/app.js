// The page: what all parts share is asked for here, once.
import { ApiError, askAgain, forgetKey, get, hasKey, onKeyNeeded } from "./api.js";
import { Dashboard } from "./dashboard.js";
import { emptyHistory, grown } from "./history.js";
import { KeyDialog } from "./key.js";
import { Playground } from "./playground.js";
import { usePoll } from "./poll.js";
import { Timeline } from "./timeline.js";
import { html, render, useEffect, useState } from "./ui.js";

const EVERY = 1000;

function App() {
  const [history, setHistory] = useState(emptyHistory);
  const [models, setModels] = useState([]);
  const [failure, setFailure] = useState(null); // an ApiError
  const [dialog, setDialog] = useState({ open: false, refused: false });
  const [theme, switchTheme] = useTheme();
  const stats = history.samples.at(-1);
  onKeyNeeded((refused) => setDialog({ open: true, refused }));

  usePoll(async () => {
    try {
      const now = await get("debug/stats");
      setHistory((before) => grown(before, now));
      if (models.length === 0) setModels((await get("v1/models")).data.map(({ id }) => id));
      setFailure(null);
    } catch (error) {
      setFailure(error instanceof ApiError ? error : new ApiError(0, "The server does not answer."));
    }
  }, EVERY);

  const locked = failure?.status === 401;
  return html`<a class="skip" href="#playground">To the playground</a>
    <header class="top">
      <h1><img src="static/mark.svg" alt="" width="26" height="26" />Gapless</h1>
      <${State} stats=${stats} failure=${failure} />
      <nav aria-label="Parts of this page">
        <a href="#playground">Playground</a><a href="#timeline">Timeline</a><a href="#dashboard">Dashboard</a>
      </nav>
      <div class="actions">
        ${locked && html`<button type="button" class="main" onClick=${askAgain}>Enter API key</button>`}
        ${!locked && hasKey() && html`<button type="button" onClick=${forgetKey}>Forget key</button>`}
        <button type="button" class="theme" aria-label=${`Switch to ${theme === "dark" ? "light" : "dark"} colours`} onClick=${switchTheme}>
          <svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true">
            <circle cx="10" cy="10" r="7.2" class="theme-ring" />
            <path d="M10 2.8a7.2 7.2 0 0 1 0 14.4z" class="theme-half" />
          </svg>
        </button>
      </div>
    </header>
    <main>
      <${Playground} models=${models} />
      <div class="live">
        <${Timeline} stats=${stats} />
        <${Dashboard} history=${history} stats=${stats} error=${failure && stats ? failure.message : ""} theme=${theme} />
      </div>
    </main>
    <${KeyDialog} ...${dialog} close=${() => setDialog({ open: false, refused: false })} />`;
}

function State({ stats, failure }) {
  const state = failure ? (failure.status === 401 ? "locked" : failure.status === 503 ? "unavailable" : "unreachable") : (stats?.state ?? "…");
  const words = { locked: "needs an API key", unreachable: "no answer" }[state] ?? state;
  return html`<p class="state" role="status" title=${failure?.message}>
    <i class=${`lamp ${state}`}></i><span>${words}</span>
    ${stats && html`<span class="soft what">${stats.model} on ${stats.device}</span>`}
  </p>`;
}

/** What is seen now, "dark" or "light", and how to change it for good. */
function useTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const [theme, setTheme] = useState(document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light"));
  useEffect(() => {
    const follow = () => {
      if (!document.documentElement.dataset.theme) setTheme(system.matches ? "dark" : "light");
    };
    system.addEventListener("change", follow);
    return () => system.removeEventListener("change", follow);
  }, []);
  return [
    theme,
    () => {
      const other = theme === "dark" ? "light" : "dark";
      document.documentElement.dataset.theme = other;
      localStorage.setItem("gapless.theme", other);
      setTheme(other);
    },
  ];
}

render(html`<${App} />`, document.body);
