"""Routed experts: captured, kept in a ledger, sliced, shipped, and replayed in a trainer."""
