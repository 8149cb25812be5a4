"""The gate of GGUF exports: llama.cpp itself against the PyTorch model."""
