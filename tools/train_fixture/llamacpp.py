"""Prove that llama.cpp sees what transformers sees: same prompt text, token ids, number of tiles, same answers."""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tools.train_fixture.gguf_files import write_mmproj, write_text
from vlmexport.calibrate.synthetic import TEST_SEEDS, scene
from vlmexport.demo import FrozenQuestion, frozen_questions

SIZES = ((64, 64), (64, 32), (32, 64), (96, 64), (128, 128), (200, 150), (20, 70), (300, 90))


class LlamaServer:
    """llama.cpp's HTTP server in this process, serving one model folder written as GGUF into `work`."""

    def __init__(self, model: Path, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        params = xllamacpp.CommonParams()
        params.model.path = str(write_text(model, work / "text.gguf"))
        params.mmproj.path = str(write_mmproj(model, work / "mmproj.gguf"))
        params.n_ctx = 1024
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.cpuparams_batch.n_threads = 1
        params.warmup = False
        params.port = 0
        self._server = xllamacpp.Server(params)
        self._wait()
        self.marker: str = self.get("/props")["media_marker"]

    def _wait(self) -> None:
        for _ in range(100):
            try:
                self.get("/health")
            except urllib.error.URLError:
                time.sleep(0.1)
            else:
                return
        raise TimeoutError("llama.cpp's server did not answer within ten seconds")

    def get(self, route: str) -> dict[str, Any]:
        """Return the JSON of a GET request."""
        with urllib.request.urlopen(self._server.listening_address + route, timeout=60) as reply:
            return json.load(reply)

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON of a POST request."""
        request = urllib.request.Request(
            self._server.listening_address + route,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of a text, special tokens parsed, nothing added."""
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

    def rendered(self, images: list[Image.Image], question: str) -> str:
        """Return the prompt that the chat template gives, each image as `<image>`."""
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(i)}"}} for i in images]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        return self.post("/apply-template", {"messages": messages})["prompt"].replace(self.marker, "<image>")

    def complete(self, prompt: str, images: list[Image.Image], tokens: int, probabilities: int = 0) -> dict[str, Any]:
        """Return the greedy completion of a prompt whose images are written `<image>`."""
        return self.post(
            "/completion",
            {
                "prompt": {
                    "prompt_string": prompt.replace("<image>", self.marker),
                    "multimodal_data": [encoded(image) for image in images],
                },
                "n_predict": tokens,
                "temperature": 0,
                "return_tokens": True,
                "n_probs": probabilities,
                "cache_prompt": False,
            },
        )


def encoded(image: Image.Image) -> str:
    """Return a picture as base64 PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class TransformersSide:
    """The same questions asked of transformers."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def rendered(self, images: list[Image.Image], question: str) -> str:
        """Return the prompt that the chat template gives."""
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def inputs(self, prompt: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Return ids and pixels of a prompt."""
        return self.processor(text=prompt, images=images or None, return_tensors="pt")

    @torch.no_grad()
    def first_logprobs(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        """Return the log probabilities [vocabulary] of the first answer token."""
        return self.model(**self.inputs(prompt, images)).logits[0, -1].log_softmax(-1)

    def answer(self, prompt: str, images: list[Image.Image], tokens: int) -> str:
        """Return the greedy answer."""
        inputs = self.inputs(prompt, images)
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)


def differences(
    server: LlamaServer, reference: TransformersSide, images: list[Image.Image], question: str
) -> list[str]:
    """Return every way in which the two sides differ on one prompt; empty when they agree."""
    found = []
    prompt = reference.rendered(images, question)
    if (theirs := server.rendered(images, question)) != prompt:
        found.append(f"template: {theirs!r} instead of {prompt!r}")
    inputs = reference.inputs(prompt, images)
    ids = inputs["input_ids"][0].tolist()
    spelled = reference.processor.tokenizer.decode(ids)
    if server.token_ids(spelled) != ids:
        found.append(f"ids of {spelled!r}")
    reply = server.complete(prompt, images, tokens=1, probabilities=reference.model.config.text_config.vocab_size)
    if reply["tokens_evaluated"] != len(ids):
        found.append(f"{reply['tokens_evaluated']} prompt tokens instead of {len(ids)} for {[i.size for i in images]}")
    worst = _worst_logprob(reply, reference.first_logprobs(prompt, images))
    if worst > 0.15:
        found.append(f"log probability differs by {worst:.3f} for {[i.size for i in images]}")
    return found


def _worst_logprob(reply: dict[str, Any], expected: torch.Tensor) -> float:
    """Return the largest difference over tokens with a probability of at least one in a thousand."""
    given = {entry["id"]: entry["logprob"] for entry in reply["completion_probabilities"][0]["top_logprobs"]}
    likely = [index for index in range(len(expected)) if expected[index] > -7]
    return max(abs(given.get(index, -99.0) - float(expected[index])) for index in likely)


def main() -> None:
    """Compare both sides on several sizes, on two pictures, on plain text and on frozen questions."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        server, reference = LlamaServer(options.model, Path(work)), TransformersSide(options.model)
        found = [] if len(server.token_ids("\n\n")) == 1 else ["two newlines are not one token"]
        picture = scene(TEST_SEEDS[0]).image
        for size in SIZES:
            found += differences(server, reference, [picture.resize(size)], "Describe the image.")
        pair = [picture, scene(TEST_SEEDS[1]).image]
        found += differences(server, reference, pair, "First image: What is in the image?")
        found += differences(server, reference, [], "Is 42 + 17 = 59?\n\nTabs\tand  spaces, \u00fc.")
        asked = frozen_questions()
        same = 0
        for question in asked[:: max(1, len(asked) // options.questions)][: options.questions]:
            same += same_answer(server, reference, question)
    print(f"{same} of {options.questions} greedy answers equal; differences: {found or 'none'}")
    if found:
        raise SystemExit(1)


def same_answer(server: LlamaServer, reference: TransformersSide, question: FrozenQuestion) -> bool:
    """Return whether both sides answer one question with the same text."""
    with Image.open(question.image) as stored:
        images = [stored.convert("RGB")]
    prompt = reference.rendered(images, question.question)
    return server.complete(prompt, images, 48)["content"] == reference.answer(prompt, images, 48)


if __name__ == "__main__":
    main()
