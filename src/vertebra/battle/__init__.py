"""Battle: contenders x probes x seeds, and the report."""
