"""Axes of models that declare none; knows `core` and JAX alone."""
