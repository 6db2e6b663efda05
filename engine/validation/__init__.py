"""Checks of request bodies, token ids and configuration options; every error names its field."""
