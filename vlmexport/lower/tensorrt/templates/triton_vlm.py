"""Triton model ``vlm``: token ids and pixels in, token ids out, through the other models of this repository.

One request is one prompt. Its image features take the places of the image tokens, the decoder reads the prompt, and
then one token after another is chosen, the likeliest each time, until the model ends its answer, ``max_tokens`` are
there or the KV cache is full. The numbers of the model come from ``parameters`` in ``config.pbtxt``.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]


class RequestError(Exception):
    """A request that cannot be answered: the message goes back to the client."""


class TritonPythonModel:
    """The name and the methods that Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration: `args` is Triton's, ``model_config`` in it JSON text."""
        config = json.loads(args["model_config"])
        values = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self.image_token_id = int(values["image_token_id"])
        self.eos_token_ids = set(json.loads(values["eos_token_ids"]))
        self.max_seq = int(values["max_seq"])
        self.max_prompt = int(values["max_prompt"])
        self.default_max_tokens = int(values["default_max_tokens"])
        self.embeds_dtype = np.dtype(values["embeds_dtype"])
        cache = (int(values["kv_heads"]), self.max_seq, int(values["kv_head_dim"]))
        self.cache = (int(values["kv_layers"]), (1, *cache), np.dtype(values["kv_dtype"]))
        self.decoder_keeps_cache = values["decoder_keeps_cache"] == "true"
        own = ("input_ids", "max_tokens")
        self.pixel_names = [entry["name"] for entry in config["input"] if entry["name"] not in own]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            tokens = self._generate(request)
        except (RequestError, pb_utils.TritonModelException) as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("token_ids", np.array(tokens, np.int64))])

    def _generate(self, request: Any) -> list[int]:
        ids = _array(request, "input_ids").reshape(1, -1).astype(np.int64)
        limit = _array(request, "max_tokens")
        limit = self.default_max_tokens if limit is None else int(limit[0])
        if not 0 < ids.size <= self.max_seq:
            raise RequestError(f"the prompt has {ids.size} tokens; the KV cache takes 1 to {self.max_seq}")
        if limit < 1:
            raise RequestError(f"max_tokens is {limit}; it must be 1 or more")
        embeds = self._merged(ids, request)
        decoder: _OwnCache | _PassedCache = _OwnCache() if self.decoder_keeps_cache else _PassedCache(*self.cache)
        tokens: list[int] = []
        try:
            for start in range(0, ids.size, self.max_prompt):
                logits = decoder.run(embeds[:, start : start + self.max_prompt], start)
            while True:
                token = int(np.argmax(logits))
                held = ids.size + len(tokens)
                if token in self.eos_token_ids:
                    return tokens
                tokens.append(token)
                if len(tokens) == limit or held == self.max_seq:
                    return tokens
                logits = decoder.run(self._embed(np.array([[token]], np.int64)), held)
        finally:
            decoder.close()

    def _merged(self, ids: Any, request: Any) -> Any:
        """Embeddings of the prompt, with the rows of image tokens replaced by the image features, in order."""
        embeds = self._embed(ids)
        places = ids == self.image_token_id
        features = self._image_features(request)
        rows = 0 if features is None else len(features)
        if rows != places.sum():
            raise RequestError(
                f"the prompt has {int(places.sum())} image tokens (id {self.image_token_id}) but the pixels give {rows}"
            )
        if rows:
            embeds = embeds.astype(np.result_type(embeds.dtype, features.dtype))
            embeds[places] = features
        return embeds.astype(self.embeds_dtype)

    def _image_features(self, request: Any) -> Any:
        pixels = {name: _array(request, name) for name in self.pixel_names}
        missing = [name for name, value in pixels.items() if value is None]
        if len(missing) == len(pixels):
            return None
        if missing:
            raise RequestError(f"the input {missing[0]} is missing; pixels need {', '.join(self.pixel_names)}")
        inputs = [pb_utils.Tensor(name, value) for name, value in pixels.items()]
        return call("image_features", inputs, ["image_features"])["image_features"].as_numpy()

    def _embed(self, ids: Any) -> Any:
        """Embeddings ``[1, tokens, hidden]``, of so many tokens at once as an engine takes."""
        pieces = [ids[:, start : start + self.max_prompt] for start in range(0, ids.shape[1], self.max_prompt)]
        rows = [
            call("embed_tokens", [pb_utils.Tensor("input_ids", np.ascontiguousarray(piece))], ["inputs_embeds"])
            for piece in pieces
        ]
        return np.concatenate([row["inputs_embeds"].as_numpy() for row in rows], axis=1).astype(self.embeds_dtype)


class _PassedCache:
    """A decoder that takes the cache and gives it back: it travels with every request, by way of the CPU."""

    def __init__(self, layers: int, shape: tuple[int, ...], dtype: Any) -> None:
        names = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        self.presents = [f"present.{name}" for name in names]
        empty = np.zeros(shape, dtype)
        self.caches: dict[str, Any] = {f"past_key_values.{name}": empty for name in names}

    def run(self, embeds: Any, held: int) -> Any:
        """Logits ``[vocab]`` of the last of the new tokens, of which the cache holds `held` before them."""
        pasts = [pb_utils.Tensor(name, value) for name, value in self.caches.items()]
        outputs = call("decoder", [*_decoder_inputs(embeds, held), *pasts], ["logits", *self.presents])
        presents = [outputs[name].as_numpy() for name in self.presents]
        self.caches = dict(zip(self.caches, presents, strict=True))
        return outputs["logits"].as_numpy()[0, -1]

    def close(self) -> None:
        """Nothing is held elsewhere."""


class _OwnCache:
    """A decoder that keeps the cache of the sequence that it works on, which a correlation id tells it."""

    def __init__(self) -> None:
        self.sequence = secrets.randbelow(2**63 - 1) + 1
        self.last: tuple[Any, int] | None = None

    def run(self, embeds: Any, held: int) -> Any:
        """Logits ``[vocab]`` of the last of the new tokens, of which the cache holds `held` before them."""
        flags = pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START if self.last is None else 0
        self.last = (embeds[:, :1], held)
        return self._call(embeds, held, flags)

    def _call(self, embeds: Any, held: int, flags: int) -> Any:
        extra = {"correlation_id": self.sequence, "flags": flags}
        return call("decoder", _decoder_inputs(embeds, held), ["logits"], **extra)["logits"].as_numpy()[0, -1]

    def close(self) -> None:
        """Let the decoder take another sequence: Triton ends one with a request, so one token is decoded in vain."""
        if self.last is not None:
            self._call(*self.last, pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END)


def _decoder_inputs(embeds: Any, held: int) -> list[Any]:
    last = np.array([[embeds.shape[1] - 1]], np.int64)
    return [
        pb_utils.Tensor("inputs_embeds", np.ascontiguousarray(embeds)),
        pb_utils.Tensor("write_indices", np.array([held], np.int64)),
        pb_utils.Tensor("logits_positions", last),
    ]


def _array(request: Any, name: str) -> Any:
    """An input of the request, or None."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def call(model: str, inputs: list[Any], outputs: list[str], **extra: Any) -> dict[str, Any]:
    """Run another model of the repository; its outputs by name, in CPU memory."""
    memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
    request = pb_utils.InferenceRequest(
        model_name=model, requested_output_names=outputs, inputs=inputs, preferred_memory=memory, **extra
    )
    response = request.exec()
    if response.has_error():
        raise pb_utils.TritonModelException(f"{model}: {response.error().message()}")
    return {name: pb_utils.get_output_tensor_by_name(response, name) for name in outputs}
