"""Runs: from a configuration to a result, with everything written on the way."""
