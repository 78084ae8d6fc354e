"""Plain PyTorch: the oracle that every kernel is held to, and the reference transformer."""
