"""What concepts are worth."""
