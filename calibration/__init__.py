"""Calibration recipes and small redistributable samples."""
