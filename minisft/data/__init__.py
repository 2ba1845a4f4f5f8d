"""From files to packed streams of tokens. It knows nothing of models."""
