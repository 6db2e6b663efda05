"""Structured output: grammars as llguidance reads them, their check at the edge, and the masks of tokens they allow."""
