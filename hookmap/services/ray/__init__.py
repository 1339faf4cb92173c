"""Captures over many processes and machines, on Ray: one driver decides and commits, each worker holds a model."""
