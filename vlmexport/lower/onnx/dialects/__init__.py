"""One module per runtime dialect of ONNX."""
