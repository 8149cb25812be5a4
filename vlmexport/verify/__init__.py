"""The proof: lowering error and quantization loss of an artifact, measured in the real runtime."""
