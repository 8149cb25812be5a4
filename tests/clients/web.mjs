// node web.mjs JOB.json OUT.json [CHROMIUM]: asks on the page of `vlmexport web` as a person does, in a headless Chromium.
// A request to a place that is not in `origins` is refused and named in the result.
import { createRequire } from "node:module";
import { readFile, writeFile } from "node:fs/promises";

import { chromium } from "playwright-core";

import { bundled } from "./chromium.mjs";

const [jobFile, outFile, executablePath] = process.argv.slice(2);
const { address, origins, asks, screenshots } = JSON.parse(await readFile(jobFile, "utf8"));
const require = createRequire(import.meta.url);
const modules = require.resolve.paths("playwright-core").find((p) => p.startsWith(import.meta.dirname));
const place = executablePath ? { executablePath } : await bundled(modules);
const browser = await chromium.launch({ ...place, args: ["--no-sandbox", "--disable-gpu"] });
const context = await browser.newContext({ viewport: { width: 1000, height: 620 } });
const foreign = [], requests = [], errors = [], results = [];
await context.route("**/*", (route) => {
  const url = route.request().url();
  requests.push(url);
  if (origins.some((origin) => url.startsWith(origin)) || /^(blob|data):/.test(url)) return route.continue();
  foreign.push(url);
  return route.abort();
});
const page = await context.newPage();
page.on("pageerror", (error) => errors.push(String(error)));
page.on("console", (message) => {
  if (message.type() === "error") errors.push(message.text());
});
await page.goto(address);
await page.waitForSelector("#go:enabled", { timeout: 60_000 });
const isolated = await page.evaluate("self.crossOriginIsolated");
for (const { dtype, image, text, tokens, stop } of asks) {
  await page.selectOption("#dtype", dtype);
  if (image) await page.setInputFiles("#file", image);
  await page.fill("#prompt", text);
  await page.fill("#tokens", String(tokens));
  await page.click("#go");
  if (stop) await page.click("#stop", { timeout: 300_000 });
  await page.waitForSelector("#go:enabled", { timeout: 300_000 });
  const words = (selector) => page.locator(selector).allInnerTexts();
  const [terms, values] = [await words("#timings dt"), await words("#timings dd")];
  results.push({
    answer: await page.textContent("#answer"),
    error: await page.textContent("#error"),
    timings: Object.fromEntries(terms.map((term, index) => [term, values[index]])),
  });
}
for (const scheme of screenshots ? ["light", "dark"] : []) {
  await page.emulateMedia({ colorScheme: scheme });
  await page.screenshot({ path: `${screenshots}-${scheme}.png` });
}
await browser.close();
await writeFile(outFile, JSON.stringify({ results, foreign, requests, errors, isolated }));
process.exit(0);
