"""Search: spaces and searchers."""
