"""Recipes: Python functions that return a run, one a file."""
