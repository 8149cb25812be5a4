"""Timing and memory of an artifact against PyTorch in the same run."""
