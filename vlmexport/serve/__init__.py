"""The local page and the OpenAI-compatible server for trying an export: one answer at a time, everything bounded."""
