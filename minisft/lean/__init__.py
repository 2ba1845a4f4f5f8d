"""Ways to train with less memory; the core does not know them."""
