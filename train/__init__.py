"""The trainer: `python -m train [PRESET] [--flags]`, `python -m train.evaluate`, `python -m train.generate`."""
