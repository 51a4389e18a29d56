"""Caches in folders, on S3-compatible storage and on the Hugging Face Hub: sent, fetched, and read from afar."""
