// Drives the page of a server in Chromium. Prints {check: null or what went wrong} as JSON.
//
//   node drive.mjs URL PID KEY TOOLS [SHOTS]
//
// PID is the server's process and KEY its API key, TOOLS a folder with node_modules of playwright-core and maybe
// axe-core, SHOTS a folder for screenshots.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [url, pid, key, tools, shots] = process.argv.slice(2);
const require = createRequire(join(tools, "node_modules/"));
const { chromium } = require("playwright-core");
const axe = found("axe-core");

const FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"];
const QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"];
const WIDE = { width: 1440, height: 900 };
const PHONE = { width: 360, height: 780 };
const MARKUP = '<img src="x" onerror="document.title=1"><script>document.title=2</script>';

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [...FLAGS, ...QUIET],
});
const context = await browser.newContext({ viewport: WIDE, colorScheme: "light", deviceScaleFactor: 1.5 });
const page = await context.newPage();
page.setDefaultTimeout(30_000);
const complaints = [];
let engineIsGone = false; // while it is, the console tells of many a 503
const elsewhere = [];
page.on("console", (message) => {
  const expected = (engineIsGone ? /status of 503/ : /status of (400|401)/).test(message.text()); // a check's doing
  if (["error", "warning"].includes(message.type()) && !expected) complaints.push(message.text());
});
page.on("pageerror", (error) => complaints.push(error.message));
page.on("request", (request) => {
  if (new URL(request.url()).origin !== new URL(url).origin) elsewhere.push(request.url());
});
await context.addInitScript(() => {
  delete Crypto.prototype.randomUUID; // as where the page comes over plain http from another machine
  addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`));
});

const answers = page.locator(".turn.model");
const answer = answers.last();
const ended = () => page.waitForFunction(() => !document.querySelector(".turn.going") && document.querySelector(".turn.model"), null, { timeout: 120_000 });

const checks = {
  async "a wrong key is refused, and the right one lets in"() {
    await page.goto(url);
    const field = page.getByLabel("Key", { exact: true });
    await field.fill("wrong");
    await page.getByRole("button", { name: "Use this key" }).click();
    await page.getByText("The server refused that key.").waitFor();
    await field.fill(key);
    await page.getByRole("button", { name: "Use this key" }).click();
    await page.locator(".lamp.ready").waitFor();
    assert.ok(!page.url().includes(key));
  },

  async "an answer grows as it comes, and its figures are told"() {
    await page.getByLabel("Message", { exact: true }).fill("Why is the sky blue?");
    await page.keyboard.press("Enter");
    const lengths = [];
    for (let more = 0; more < 3; more++) {
      const length = lengths.at(-1) ?? 0;
      await page.waitForFunction((least) => document.querySelector(".turn.model .text")?.textContent.length > least, length);
      lengths.push((await answer.locator(".text").textContent()).length);
    }
    assert.match(await answer.locator(".figures").textContent(), /\d+ tokens · [\d.]+ tokens\/s · first after [\d.]+ s/);
  },

  async "the stop button ends the answer and its work"() {
    await page.getByRole("button", { name: "Stop", exact: true }).click();
    await answer.getByText("stopped by you").waitFor();
    await page.waitForFunction(() => document.querySelector('[data-figure="requests"]').textContent === "0");
    await page.getByRole("button", { name: "Send" }).waitFor();
  },

  async "each token shows its probability and what else might have come, by keyboard, too"() {
    const tokens = answer.locator(".token");
    assert.ok((await tokens.count()) > 2);
    assert.equal((await tokens.allTextContents()).join(""), await answer.locator(".text").textContent());
    await tokens.first().focus();
    await page.keyboard.press("ArrowRight");
    assert.equal(await page.evaluate(() => document.activeElement.dataset.at), "1");
    const rows = page.getByRole("tooltip").locator("li");
    assert.ok((await rows.count()) >= 5);
    assert.match(await rows.first().textContent(), /%/);
    await page.keyboard.press("Escape");
    await page.getByRole("tooltip").waitFor({ state: "detached" });
  },

  async "a refused request is told, and can be tried again"() {
    await page.locator(".parameters summary").click();
    await page.getByLabel("Top p").fill("0");
    await page.getByLabel("Message", { exact: true }).fill("Hello");
    await page.getByRole("button", { name: "Send" }).click();
    await answer.getByRole("alert").getByText("top_p").waitFor();
    await page.getByLabel("Top p").fill("");
    await page.getByLabel("Max tokens").fill("8");
    await answer.getByRole("button", { name: "Try again" }).click();
    await answer.getByText("cut off by max tokens").waitFor();
  },

  async "a parameter that cannot be is told before it is sent"() {
    const field = page.getByLabel("JSON schema of the answer");
    await field.fill("{");
    await page.getByText("Not JSON").waitFor();
    assert.equal(await field.getAttribute("aria-invalid"), "true");
    await page.getByLabel("Message", { exact: true }).fill("Hello");
    assert.ok(await page.getByRole("button", { name: "Send" }).isDisabled());
    await field.fill("");
  },

  async "markup in an answer is text"() {
    for (const tinted of [true, false]) {
      await page.getByLabel("Probabilities").setChecked(tinted);
      await page.getByRole("button", { name: "Clear" }).click();
      await page.getByLabel("JSON schema of the answer").fill(JSON.stringify({ const: MARKUP }));
      await page.getByLabel("Max tokens").fill("128");
      await page.getByLabel("Message", { exact: true }).fill("Say it.");
      await page.getByRole("button", { name: "Send" }).click();
      await ended();
      assert.equal(JSON.parse(await answer.locator(".text").textContent()), MARKUP);
      assert.equal(await page.locator(".log img, .log script").count(), 0);
      assert.equal(await page.title(), "Gapless");
    }
    await page.getByLabel("Probabilities").check();
    await page.getByLabel("JSON schema of the answer").fill("");
    await page.getByLabel("Max tokens").fill("256");
    await page.locator(".parameters summary").click();
    await page.getByRole("button", { name: "Clear" }).click();
  },

  async "thoughts stand apart from the answer, and are not said again"() {
    const bodies = [];
    await page.route("**/v1/chat/completions", async (route) => {
      bodies.push(route.request().postDataJSON());
      const deltas = [{ reasoning_content: "It is " }, { reasoning_content: "<b>12</b>." }, { content: "Twelve." }];
      const chunks = deltas.map((delta) => ({ choices: [{ index: 0, delta, finish_reason: null }] }));
      chunks.push({ choices: [{ index: 0, delta: {}, finish_reason: "stop" }] });
      const body = [...chunks.map((chunk) => JSON.stringify(chunk)), "[DONE]"].map((data) => `data: ${data}\n\n`).join("");
      await route.fulfill({ contentType: "text/event-stream", body });
    });
    for (const text of ["Three times four?", "And again?"]) {
      await page.getByLabel("Message", { exact: true }).fill(text);
      await page.getByRole("button", { name: "Send" }).click();
      await ended();
      await answer.locator(".text", { hasText: "Twelve." }).waitFor();
    }
    assert.equal(await answers.count(), 2);
    const thoughts = answer.locator("details.thoughts");
    assert.equal(await thoughts.getAttribute("open"), null); // the answer is what counts, now that there is one
    await thoughts.locator("summary").click();
    assert.equal(await thoughts.locator(".text").textContent(), "It is <b>12</b>.");
    assert.deepEqual(
      bodies[1].messages.map(({ content }) => content),
      ["Three times four?", "Twelve.", "And again?"],
    );
    await page.unroute("**/v1/chat/completions");
    await page.getByRole("button", { name: "Clear" }).click();
  },

  async "the dashboard moves while the model answers"() {
    await page.getByRole("button", { name: "Why is the sky blue?" }).click();
    await page.waitForFunction(() => Number(document.querySelector('[data-figure="tokens"]').textContent) > 0);
    await page.waitForFunction(() => document.querySelector('[data-figure="busy"]').textContent.endsWith("%"));
    const inked = await page.locator(".tile canvas").evaluateAll((all) =>
      all.map((canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((byte) => byte > 0)),
    );
    assert.equal(inked.length, 10);
    assert.ok(inked.slice(0, 3).every(Boolean), `charts: ${inked}`);
  },

  async "the timeline draws every lane, in two colours, and goes on"() {
    const lanes = page.locator(".lanes");
    await lanes.locator("rect.span.s0").first().waitFor();
    await lanes.locator("rect.span.s1").first().waitFor();
    for (const lane of ["host", "H2D", "compute", "D2H"]) assert.equal(await lanes.getByText(lane, { exact: true }).count(), 1);
    const before = await page.locator(".run-head .figures").textContent();
    await page.waitForFunction((text) => document.querySelector(".run-head .figures").textContent !== text, before);
  },

  async "the arrow keys tell of one bar after the other"() {
    await page.locator(".lanes").focus();
    const told = [];
    for (const [arrow, pattern] of [["Right", /^host: /], ["Down", /^H2D: copy \w+ · step \d+ · slot [AB] · [\d.]+ ms/], ["Down", /^compute: /]]) {
      await page.keyboard.press(`Arrow${arrow}`);
      await page.waitForFunction((text) => document.querySelector(".readout").textContent !== text, told.at(-1));
      told.push(await page.locator(".readout").textContent());
      assert.match(told.at(-1), pattern, told.join(" | "));
    }
    await page.keyboard.press("ArrowRight");
    await page.waitForFunction((text) => document.querySelector(".readout").textContent !== text, told.at(-1));
  },

  async "its figures stand in a table, too"() {
    await page.locator(".figures-table summary").click();
    const cells = await page.locator(".figures-table tbody tr").first().locator("td").allTextContents();
    assert.equal(cells.length, 5);
    assert.match(cells[2], /%$/);
    await page.locator(".figures-table summary").click();
  },

  async "the switch sets the engine's lookahead"() {
    await page.getByRole("radio", { name: "0" }).check({ force: true });
    await page.locator(".tile").getByText("lookahead 0").waitFor();
    await page.getByRole("radio", { name: "1" }).check({ force: true });
    await page.locator(".tile").getByText("lookahead 1").waitFor();
  },

  async "the same load at both lookaheads stands on one time scale"() {
    await ended();
    const setBy = (more) => page.request.post(new URL("debug/lookahead", url).href, { headers: { "x-api-key": key }, data: { lookahead: 1, ...more } });
    await page.getByRole("button", { name: "Compare 0 and 1" }).click();
    await page.locator(".tile").getByText("lookahead 0").waitFor();
    assert.equal((await setBy({ seconds: 60, lease: "another tab" })).status(), 409);
    assert.equal((await setBy({})).status(), 200); // the switch of another tab
    await page.getByRole("alert").getByText("The lookahead did not stay at 0").waitFor({ timeout: 120_000 });
    await page.getByRole("button", { name: "Compare 0 and 1" }).click();
    await page.getByRole("button", { name: "Compare again" }).waitFor({ timeout: 240_000 });
    const verdict = await page.locator(".timeline .status").textContent();
    assert.match(verdict, /384 tokens each: [\d.]+ tokens\/s at lookahead 0, [\d.]+ at 1, [\d.]+ times/);
    assert.deepEqual(await page.locator(".run-title, .run-name").allTextContents(), ["lookahead 0", "lookahead 1"]);
    assert.equal(await page.locator(".lanes .track").count(), 8);
    await page.locator(".tile").getByText("lookahead 1").waitFor();
    await shot("compare");
  },

  async "nobody is asked while the page is hidden"() {
    const hide = (state) =>
      page.evaluate((value) => {
        Object.defineProperty(document, "visibilityState", { configurable: true, get: () => value });
        document.dispatchEvent(new Event("visibilitychange"));
      }, state);
    await page.getByRole("button", { name: "Back to live" }).click();
    await hide("hidden");
    await page.waitForLoadState("networkidle"); // half a second without a request, which polling never leaves free
    let asked = 0;
    page.on("request", () => asked++);
    await page.waitForTimeout(2500);
    assert.equal(asked, 0);
    await hide("visible");
    await page.waitForRequest(/debug\/stats/);
  },

  async "its pictures are taken while it answers"() {
    for (const [name, colorScheme, viewport] of [["light", "light", WIDE], ["dark", "dark", WIDE], ["phone", "dark", PHONE]]) {
      await page.emulateMedia({ colorScheme });
      await page.setViewportSize(viewport);
      await page.getByRole("combobox", { name: "Steps" }).selectOption(name === "phone" ? "4" : "8");
      await page.getByRole("button", { name: "Clear" }).click();
      await page.getByRole("button", { name: "Why is the sky blue?" }).click();
      await page.waitForFunction(() => document.querySelector(".turn.model .text")?.textContent.length > 320);
      if (name === "light") await answer.locator(".token").nth(6).hover();
      else await page.mouse.move(1, 1);
      await page.evaluate(() => (document.activeElement.blur(), scrollTo({ top: 0, behavior: "instant" })));
      await shot(name, name === "phone");
    }
    await page.getByRole("button", { name: "Stop", exact: true }).click();
  },

  async "dark, light and a phone's width please axe"() {
    const worst = [];
    for (const [name, colorScheme, viewport] of [["light", "light", WIDE], ["dark", "dark", WIDE], ["phone", "light", PHONE]]) {
      await page.emulateMedia({ colorScheme });
      await page.setViewportSize(viewport);
      await page.locator(".parameters summary").click();
      await page.locator(".figures-table summary").click();
      worst.push(...(await violations(name)));
      const over = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      if (over > 0) worst.push(`${name}: ${over} pixels too wide`);
      await page.locator(".parameters summary").click();
      await page.locator(".figures-table summary").click();
    }
    assert.deepEqual(worst, []);
  },

  async "the theme button changes the colours for good"() {
    await page.setViewportSize(WIDE);
    await page.emulateMedia({ colorScheme: "light" });
    const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const light = await paper();
    await page.getByRole("button", { name: "Switch to dark colours" }).click();
    const dark = await paper();
    assert.notEqual(dark, light);
    await page.reload();
    await page.locator(".lamp.ready").waitFor(); // with the key that the tab kept
    assert.equal(await paper(), dark);
    await page.getByRole("button", { name: "Switch to light colours" }).click();
    assert.equal(await paper(), light);
  },

  async "a language that Intl refuses does not stop it"() {
    const odd = await browser.newContext(); // Chromium tells this one in the locale C
    await odd.addInitScript(() => Object.defineProperty(Navigator.prototype, "language", { get: () => "en-US@posix" }));
    const other = await odd.newPage();
    await other.goto(url);
    await other.getByLabel("Key", { exact: true }).waitFor({ timeout: 10_000 });
    await odd.close();
  },

  async "an engine that dies is told, and the page goes on with the next one"() {
    await page.getByRole("button", { name: "Why is the sky blue?" }).click();
    const grows = () => page.waitForFunction(() => document.querySelector(".turn.model .text")?.textContent.length > 0);
    await grows();
    engineIsGone = true;
    process.kill(enginePid(), "SIGKILL");
    await answer.getByRole("alert").getByText("the engine has failed").waitFor();
    await page.locator(".lamp.unavailable").waitFor();
    await page.locator(".lamp.ready").waitFor({ timeout: 90_000 });
    engineIsGone = false;
    await answer.getByRole("button", { name: "Try again" }).click();
    await grows();
    await page.getByRole("button", { name: "Stop", exact: true }).click();
    await answer.getByText("stopped by you").waitFor();
  },

  async "the console is silent, and nothing was asked of another host"() {
    assert.deepEqual(complaints, []);
    assert.deepEqual(elsewhere, []);
  },
};

function enginePid() {
  const tasks = readdirSync(`/proc/${pid}/task`);
  const children = tasks.flatMap((task) => readFileSync(`/proc/${pid}/task/${task}/children`, "utf8").split(" ").filter(Boolean));
  return Number(children.find((child) => readFileSync(`/proc/${child}/cmdline`, "utf8").includes("engine_process")));
}

function found(name) {
  try {
    return readFileSync(require.resolve(name), "utf8");
  } catch {
    return null;
  }
}

/** Of axe, those that are serious. The policy lets the page run no script of ours: axe runs in the debugger's world. */
async function violations(name) {
  if (axe === null) return [];
  await page.evaluate(axe);
  const { violations: all } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  const serious = all.filter(({ impact }) => ["serious", "critical"].includes(impact));
  return serious.flatMap(({ id, nodes }) => nodes.map(({ target, failureSummary }) => `${name}: ${id}: ${target}: ${failureSummary}`));
}

async function shot(name, whole = false) {
  if (shots) await page.screenshot({ path: join(shots, `page-${name}.png`), fullPage: whole });
}

const results = {};
for (const [name, check] of Object.entries(checks)) {
  results[name] = await check().then(
    () => null,
    (error) => String(error.message).slice(0, 2000),
  );
  process.stderr.write(`${results[name] === null ? "ok  " : "FAIL"} ${name}\n`);
}
await browser.close();
process.stdout.write(JSON.stringify(results));
