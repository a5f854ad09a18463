"""Blocks: what two pages share, and papers whose idea is one block."""
