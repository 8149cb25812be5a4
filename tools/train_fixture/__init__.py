"""Reproduces the bundled model: data, tokenizer, training, frozen questions, llama.cpp checks (see README.md)."""
