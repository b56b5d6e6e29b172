"""Presets of `python -m train PRESET`, one file each, every one with a `config`."""
