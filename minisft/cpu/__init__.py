"""Kernels for a CPU: what PyTorch lacks there, or does slowly."""
