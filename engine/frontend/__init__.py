"""The frontend: validates and tokenises requests, chooses the dp rank, returns outputs. Imports no torch."""
