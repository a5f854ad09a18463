"""Shipping: export, runtimes, hubs."""
