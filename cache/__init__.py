"""Activations on disk: layout, encoding, writing, streaming, integrity. Knows no model and no trainer."""
