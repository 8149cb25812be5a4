"""ggml's block formats: their types, llama-quantize's choice among them, and ggml's own quantizers."""
