// What a user of transformers.js does with an export, in Node and in a page alike.

/**
 * Answer every question on given pixels, and on the client's own.
 *
 * @param {object} api the @huggingface/transformers module
 * @param {object} job `model` (folder name), `dtype` (null: the export's default), `device`, `max_new_tokens`, `cases`
 * @param {(file: string) => Promise<ArrayBuffer>} read reads a file of the job's folder
 * @param {(file: string) => string} place what RawImage.read takes for a file of the job's folder
 */
export async function run(api, job, read, place) {
  const { AutoModelForImageTextToText, AutoProcessor } = api;
  const processor = await AutoProcessor.from_pretrained(job.model);
  const model = await AutoModelForImageTextToText.from_pretrained(job.model, {
    device: job.device,
    ...(job.dtype ? { dtype: job.dtype } : {}),
  });
  const results = [];
  for (const question of job.cases) {
    const given = await tensors(api, question.inputs, read);
    results.push({
      logits: await lastLogits(model, given),
      given: await answer(model, given, job.max_new_tokens),
      // Its processors lay out one picture; what several would be stays open.
      own: question.images.length === 1 ? await ownPixels(api, processor, model, question, job, place) : null,
    });
  }
  await model.dispose();
  return results;
}

async function tensors({ Tensor }, inputs, read) {
  const found = {};
  for (const { name, dtype, dims, file } of inputs) {
    const bytes = await read(file);
    const array =
      dtype === "int64" ? new BigInt64Array(bytes) : dtype === "bool" ? new Uint8Array(bytes) : new Float32Array(bytes);
    found[name] = new Tensor(dtype, array, dims);
  }
  return found;
}

async function ownPixels({ RawImage }, processor, model, question, job, place) {
  const content = [...question.images.map(() => ({ type: "image" })), { type: "text", text: question.text }];
  const prompt = job.plain
    ? "<image>".repeat(question.images.length) + question.text
    : processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const images = await Promise.all(question.images.map((file) => RawImage.read(place(file))));
  const inputs = await (job.images_first ? processor(images, prompt) : processor(prompt, images));
  return {
    prompt,
    input_ids: numbers(inputs.input_ids),
    tokens: await answer(model, inputs, job.max_new_tokens),
  };
}

async function answer(model, inputs, max_new_tokens) {
  const out = await model.generate({ ...inputs, max_new_tokens, do_sample: false });
  return numbers(out).slice(inputs.input_ids.dims.at(-1));
}

/** Logits of the token behind the prompt. */
async function lastLogits(model, inputs) {
  const { logits } = await model(inputs);
  return numbers(logits.to("float32")).slice(-logits.dims.at(-1));
}

const numbers = (tensor) => Array.from(tensor.data, Number);
