"""Kernels of Parallax attention: arrays, tiles and devices; nothing here knows a model."""
