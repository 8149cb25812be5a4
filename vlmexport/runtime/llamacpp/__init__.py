"""llama.cpp as the real client of a GGUF export, from the pinned xllamacpp wheel, by ctypes."""
