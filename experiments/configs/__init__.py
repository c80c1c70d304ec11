"""Presets as settings by path, one file per method; see `presets`."""
