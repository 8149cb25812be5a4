"""Calibration data and the layer loop."""
