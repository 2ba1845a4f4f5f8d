"""Kernels for a processor: what PyTorch lacks there, or does slowly."""
