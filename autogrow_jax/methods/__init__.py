"""The growing methods, one paper each."""
