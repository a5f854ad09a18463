"""Tasks: backbone to predictions and losses."""
