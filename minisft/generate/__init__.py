"""Text from a model: decoding with a key/value cache, sampling."""
