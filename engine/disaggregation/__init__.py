"""Prefill in one engine, decode in another: how pages and routes of a prompt get from the one to the other."""
