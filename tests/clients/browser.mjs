// node browser.mjs JOBS.json OUT.json [CHROMIUM]: runs each job in a page of a headless Chromium (WebAssembly), served from
// this machine alone. A request to any other place is refused and named in the result.
import { createReadStream } from "node:fs";
import { readFile, stat, writeFile } from "node:fs/promises";
import http from "node:http";
import { createRequire } from "node:module";
import path from "node:path";

import { chromium } from "playwright-core";

import { bundled } from "./chromium.mjs";

const [jobsFile, outFile, executablePath] = process.argv.slice(2);
const { root, folder, jobs } = JSON.parse(await readFile(jobsFile, "utf8"));
const require = createRequire(import.meta.url);
const modules = require.resolve.paths("@huggingface/transformers").find((p) => p.startsWith(import.meta.dirname));
const places = {
  models: root,
  job: folder,
  wasm: path.join(modules, "onnxruntime-web", "dist"),
  client: import.meta.dirname,
};
const types = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm" };

async function serve(request, response) {
  const [, place, ...rest] = decodeURIComponent(new URL(request.url, "http://localhost").pathname).split("/");
  const name = rest.join("/");
  const file =
    place === "client" && name === "transformers.js"
      ? path.join(modules, "@huggingface", "transformers", "dist", "transformers.min.js")
      : path.join(places[place] ?? "/nowhere", name);
  const found = places[place] && !name.includes("..") ? await stat(file).catch(() => null) : null;
  if (!found?.isFile()) {
    response.writeHead(404).end();
    return;
  }
  const type = types[path.extname(file)] ?? "application/octet-stream";
  response.writeHead(200, { "content-type": type, "content-length": found.size });
  createReadStream(file).pipe(response);
}

const server = http.createServer(serve);
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const origin = `http://127.0.0.1:${server.address().port}`;
const place = executablePath ? { executablePath } : await bundled(modules);
const browser = await chromium.launch({ ...place, args: ["--no-sandbox", "--disable-gpu"] });
const foreign = [];
const errors = [];
const results = [];
const page = await browser.newPage();
page.on("pageerror", (error) => errors.push(String(error)));
await page.route("**/*", (route) => {
  const url = route.request().url();
  if (url.startsWith(origin + "/") || url.startsWith("blob:") || url.startsWith("data:")) return route.continue();
  foreign.push(url);
  return route.abort();
});
await page.goto(`${origin}/client/page.html`);
await page.waitForFunction("window.ready", null, { timeout: 60_000 });
for (const job of jobs) {
  try {
    results.push({ results: await page.evaluate((wanted) => window.runJob(wanted), job) });
  } catch (error) {
    results.push({ error: [String(error), ...errors].join("\n") });
  }
}
await browser.close();
server.close();
await writeFile(outFile, JSON.stringify({ foreign, results, version: browser.version() }));
process.exit(0);
