"""Tensors that are spread over several processes: sharding rules for DTensor."""
