"""One runner per real runtime, all with the same protocol."""
