"use strict";
// Shows what worker.js does. One worker for each choice of precision and device: a new choice ends the old one, which
// gives its memory back.
const at = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const seconds = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`);
let site, picture, worker;

function show(file) {
  picture = file;
  URL.revokeObjectURL(at("picture").src);
  at("picture").src = URL.createObjectURL(file);
  at("picture").hidden = false;
  at("hint").hidden = true;
}

function take(file) {
  if (file && file.type.startsWith("image/")) show(file);
}

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

function say(state, progress = null) {
  at("state").textContent = state;
  at("progress").hidden = progress === null;
  at("progress").value = progress ?? 0;
}

function rows(facts) {
  at("timings").replaceChildren(...facts.flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

/** A worker with the model of this choice; the one there is, where it is of the same. */
async function model(dtype, device) {
  const choice = `${dtype} ${device}`;
  if (worker?.choice === choice) return worker;
  drop();
  const made = new Worker("worker.js", { type: "module" });
  worker = made;
  made.choice = choice;
  const { bytes } = site.dtypes.find(({ name }) => name === dtype);
  say(`loading ${dtype}, ${megabytes(bytes)}`, 0);
  made.loadTime = await answer(made, { load: { site, dtype, device } }, ({ read }) => {
    if (read) say(read < bytes ? `loading ${megabytes(read)} of ${megabytes(bytes)}` : "starting", read / bytes);
  });
  return made;
}

function drop() {
  worker?.terminate();
  worker = null;
}

/** Post a message; `hear` gets what comes before the end (`loaded` or `done`), which is the result. */
function answer(to, message, hear) {
  return new Promise((resolve, reject) => {
    to.onerror = (event) => reject(new Error(event.message || "worker.js did not load"));
    to.onmessage = ({ data }) => {
      if (data.error) reject(new Error(data.error));
      else if (data.loaded ?? data.done) resolve(data.loaded ?? data.done);
      else hear(data);
    };
    to.postMessage(message);
  });
}

function stoppable(can) {
  at("stop").hidden = !can;
  at("go").hidden = can;
}

async function ask() {
  const running = await model(at("dtype").value, at("device").value);
  const stop = self.crossOriginIsolated ? new Int32Array(new SharedArrayBuffer(4)) : null;
  at("stop").onclick = () => Atomics.store(stop, 0, 1);
  stoppable(Boolean(stop));
  say("reading the prompt");
  const question = { picture, text: at("prompt").value, tokens: Number(at("tokens").value), stop };
  const done = await answer(running, { ask: question }, ({ piece }) => {
    say("answering");
    at("answer").textContent += piece;
  });
  say("");
  rows([
    ["load", seconds(running.loadTime)],
    ["time to first token", seconds(done.ttft)],
    ["answer", done.speed === null ? "one token" : `${done.speed.toFixed(1)} tokens/s`],
    ["tokens", `${done.prompt} prompt, ${done.tokens} answer${done.cut ? " (cut)" : done.stopped ? " (stopped)" : ""}`],
  ]);
}

async function start() {
  at("go").disabled = true;
  site = await (await fetch("site.json")).json();
  at("name").textContent = site.name;
  at("facts").textContent = site.words;
  at("dtype").replaceChildren(...site.dtypes.map(({ name, bytes }) => new Option(`${name}, ${megabytes(bytes)}`, name)));
  if (navigator.gpu && (await navigator.gpu.requestAdapter().catch(() => null))) {
    at("device").append(new Option("GPU (WebGPU)", "webgpu"));
  }
  at("go").disabled = false;
}

at("file").addEventListener("change", (event) => take(event.target.files[0]));
at("drop").addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
at("drop").addEventListener("dragleave", () => at("drop").classList.remove("over"));
at("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (at("go").disabled) return;
  fail("");
  rows([]);
  at("answer").textContent = "";
  at("go").disabled = true;
  try {
    await ask();
  } catch (error) {
    drop();
    say("");
    fail(`the model did not answer: ${error.message}`);
  } finally {
    at("go").disabled = false;
    stoppable(false);
  }
});
start().catch((error) => fail(`site.json could not be read: ${error.message}`));
