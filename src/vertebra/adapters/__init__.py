"""Adapters: few new parameters on a frozen backbone."""
