"""A campaign of faults against real services: see `python -m chaos --help`."""
