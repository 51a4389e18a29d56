"""Concept models and how they are fitted from a cache. Knows no language model."""
