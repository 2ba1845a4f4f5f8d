"""Data files as people have them, read into conversations."""
