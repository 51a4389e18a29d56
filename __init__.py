"""Discrete concepts between the layers of a language model (CLVQ-VAE, arXiv 2506.20040)."""

from .cache.reader import Cache as Cache
from .errors import ClvqError as ClvqError

__version__ = "0.1.0"
