// node node.mjs JOBS.json OUT.json: runs each job in this process; the models are folders of `root`.
import { readFile, writeFile } from "node:fs/promises";
import path from "node:path";

import * as api from "@huggingface/transformers";

import { run } from "./client.mjs";

const [jobsFile, outFile] = process.argv.slice(2);
const { root, folder, jobs } = JSON.parse(await readFile(jobsFile, "utf8"));
api.env.allowRemoteModels = false;
api.env.localModelPath = root + path.sep;
globalThis.fetch = (url) => {
  throw new Error(`a request was made: ${url}`);
};

const read = async (file) => {
  const bytes = await readFile(path.join(folder, file));
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
};
const results = [];
for (const job of jobs) {
  try {
    results.push({ results: await run(api, { ...job, device: "cpu" }, read, (file) => path.join(folder, file)) });
  } catch (error) {
    results.push({ error: String(error) });
  }
}
await writeFile(outFile, JSON.stringify(results));
process.exit(0);
