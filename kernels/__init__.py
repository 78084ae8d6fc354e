"""Triton device code and its launchers, one file per op."""
