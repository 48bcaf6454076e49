// Something that is asked for again and again while somebody looks.
import { useEffect, useRef } from "./ui.js";

/**
 * Calls `ask` every so many milliseconds, one call after the other, and not while the page is hidden or `active` is
 * false. `ask` deals with its own errors.
 */
export function usePoll(ask, every, active = true) {
  const latest = useRef(ask);
  latest.current = ask;
  useEffect(() => {
    if (!active) return undefined;
    let timer = 0;
    let ended = false;
    let underway = false;
    const turn = async () => {
      clearTimeout(timer);
      if (underway || document.visibilityState === "hidden") return;
      underway = true;
      const begun = performance.now();
      await latest.current();
      underway = false;
      if (!ended) timer = setTimeout(turn, Math.max(every / 4, every - (performance.now() - begun)));
    };
    document.addEventListener("visibilitychange", turn);
    turn();
    return () => {
      ended = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", turn);
    };
  }, [every, active]);
}
