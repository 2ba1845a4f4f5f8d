"""The commands around a training run: their options as data (options.py), and what each does, a file each."""
