"""Command line: one thin file a verb."""
