// The model, beside the page so that the page stays alive. It gets {load}, then {ask}s; it posts what comes of them.
// The library and every file of the model come from where site.json says, and the hub is never asked.

/** What `load` made: the library, the processor, the model, and the page's choice. */
let loaded;

async function load({ site, dtype, device }) {
  const here = new URL(".", self.location.href);
  const api = await import(new URL(site.library, here).href);
  const { env } = api;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = here.pathname;
  env.useBrowserCache = false;
  env.useWasmCache = false;
  // The library's own choice of files, but from the site.
  const local = (address) => new URL(site.wasm + address.split("/").at(-1), here).href;
  const { mjs, wasm } = env.backends.onnx.wasm.wasmPaths;
  env.backends.onnx.wasm.wasmPaths = { mjs: local(mjs), wasm: local(wasm) };

  const read = {};
  const progress_callback = ({ status, file, loaded: bytes }) => {
    if (status !== "progress" || !file.startsWith("onnx/")) return;
    read[file] = bytes;
    post({ read: Object.values(read).reduce((sum, size) => sum + size, 0) });
  };
  const processor = await api.AutoProcessor.from_pretrained("model");
  const model = await api.AutoModelForImageTextToText.from_pretrained("model", { dtype, device, progress_callback });
  loaded = { api, processor, model, site };
}

async function prepare({ picture, text }) {
  const { api, processor, site } = loaded;
  const content = [...(picture ? [{ type: "image" }] : []), { type: "text", text }];
  const prompt = processor.tokenizer.chat_template
    ? processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true })
    : text;
  // A chat template writes the tokens of the prompt's beginning by itself where the model wants them.
  if (!picture) return processor.tokenizer(prompt);
  const images = [await api.RawImage.fromBlob(picture)];
  return site.images_first ? processor(images, prompt) : processor(prompt, images);
}

async function ask({ picture, text, tokens, stop }) {
  const { api, processor, model } = loaded;
  const start = performance.now();
  const inputs = await prepare({ picture, text });
  const stopper = new api.InterruptableStoppingCriteria();
  let count = 0, first = start, last = start;
  const streamer = new api.TextStreamer(processor.tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (piece) => post({ piece }),
    token_callback_function: () => {
      last = performance.now();
      if (++count === 1) first = last;
      // No message comes in while the model runs; the page sets a flag in shared memory.
      if (stop && Atomics.load(stop, 0)) stopper.interrupt();
    },
  });
  await model.generate({
    ...inputs,
    max_new_tokens: tokens,
    do_sample: false,
    streamer,
    stopping_criteria: stopper,
  });
  post({
    done: {
      prompt: inputs.input_ids.dims.at(-1),
      tokens: count,
      ttft: first - start,
      speed: count > 1 ? ((count - 1) * 1000) / (last - first) : null,
      stopped: stopper.interrupted,
      cut: !stopper.interrupted && count >= tokens,
    },
  });
}

const post = (message) => self.postMessage(message);

self.onmessage = async ({ data }) => {
  try {
    if (data.load) {
      const start = performance.now();
      await load(data.load);
      post({ loaded: performance.now() - start });
    } else {
      await ask(data.ask);
    }
  } catch (error) {
    post({ error: error?.message ?? String(error) });
  }
};
