"""New weights from a trainer: its sender, every rank's receiver, checksums."""
