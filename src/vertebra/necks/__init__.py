"""Necks: pyramid to pyramid."""
