"""Texts to activations. The only part that loads a language model."""
