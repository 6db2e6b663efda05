"""The caller's half of a request: validation, tokens, one future a request, answers. Imports no torch."""
