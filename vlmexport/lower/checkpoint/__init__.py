"""Hugging Face checkpoints with quantized weights, one module per format, for transformers and vLLM."""
