"use strict";
// Talks to its own server alone: GET /api/info, POST /api/compare or /api/ask (server-sent events).
const at = (id) => document.getElementById(id);
let picture = null;

function show(url) {
  picture = url;
  at("picture").src = url;
  at("picture").hidden = false;
  at("hint").hidden = true;
}

function take(file) {
  if (!file || !file.type.startsWith("image/")) return;
  const reader = new FileReader();
  reader.onload = () => show(reader.result);
  reader.readAsDataURL(file);
}

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

function rows(list, facts) {
  list.replaceChildren(...facts.flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

function timings(data) {
  const of = data.timings;
  return [
    ["time to first token", `${of.ttft_ms.toFixed(0)} ms`],
    ["answer", `${of.decode_tok_s.toFixed(1)} tokens/s`],
    ["tokens", `${data.prompt_tokens} prompt, ${data.completion_tokens} answer${data.finish === "length" ? " (cut)" : ""}`],
  ];
}

function parts(found) {
  at("parts").hidden = !found.length;
  at("parts").querySelector("tbody").replaceChildren(...found.map((part) => {
    const row = document.createElement("tr");
    for (const text of [part.part, part.metric, part.value === null ? part.note : part.value.toExponential(2)]) {
      const cell = document.createElement("td");
      cell.textContent = text;
      row.append(cell);
    }
    row.lastChild.className = "n";
    return row;
  }));
}

function handle(data) {
  if (data.parts) return parts(data.parts);
  if (data.error && !data.side) return fail(data.error.message || data.error);
  const side = at(data.side);
  side.hidden = false;
  if (data.error) side.querySelector(".answer").textContent = data.error;
  else if (data.timings) rows(side.querySelector("dl"), timings(data));
  else side.querySelector(".answer").textContent += data.text;
}

async function ask() {
  const content = [{type: "text", text: at("prompt").value}];
  if (picture) content.unshift({type: "image_url", image_url: {url: picture}});
  const body = {
    messages: [{role: "user", content}],
    max_tokens: Number(at("tokens").value),
    temperature: Number(at("temperature").value),
  };
  const response = await fetch(at("both").checked ? "/api/compare" : "/api/ask", {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
  });
  if (!response.ok) return fail((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    const events = (pending + piece.value).split("\n\n");
    pending = events.pop();
    events.forEach((event) => handle(JSON.parse(event.slice("data: ".length))));
  }
}

async function start() {
  const info = await (await fetch("/api/info")).json();
  at("name").textContent = info.name;
  at("facts").textContent = info.words;
  at("both").checked = info.compares;
  at("both").parentElement.hidden = !info.compares;
  at("original").hidden = !info.compares;
}

at("file").addEventListener("change", (event) => take(event.target.files[0]));
at("drop").addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
at("drop").addEventListener("dragleave", () => at("drop").classList.remove("over"));
at("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
at("both").addEventListener("change", () => { at("original").hidden = !at("both").checked; });
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  fail("");
  parts([]);
  for (const side of ["export", "original"]) {
    at(side).querySelector(".answer").textContent = "";
    at(side).querySelector("dl").replaceChildren();
  }
  at("go").disabled = true;
  try {
    await ask();
  } catch (error) {
    fail(`the server did not answer: ${error.message}`);
  } finally {
    at("go").disabled = false;
  }
});
start().catch((error) => fail(`the server did not answer: ${error.message}`));
