"""Curricula: what is seen when."""
