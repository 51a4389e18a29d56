"""What language models make of concepts, asked over HTTP."""
