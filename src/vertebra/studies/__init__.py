"""Studies: laws, simulators, theory."""
