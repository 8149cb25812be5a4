"""The ONNX emitter: trace, dialects, streamed weights, layouts."""
