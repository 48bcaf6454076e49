// What every part of the page is made of: preact with its hooks, htm in place of a build step.
import { Component, h, render } from "./vendor/preact.mjs";
import htm from "./vendor/htm.mjs";

export * from "./vendor/hooks.mjs";
export { Component, render };
export const html = htm.bind(h);
