"""The network: a self-contained Llama-3. It knows nothing of data, of the loss, or of files other than weights."""
