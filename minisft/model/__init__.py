"""A self-contained Llama-3 and its weights. Nothing here knows the data or the loss."""
