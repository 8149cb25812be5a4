"""GGUF for llama.cpp: a text model and an ``mmproj`` file."""
