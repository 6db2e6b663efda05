"""Faults of callers, each named by its field: bodies, token ids, options of the configuration."""
