"""The commands around a training run, a file each: its options, and what it prints. `minisft --help` lists them."""

RECIPE_HELP = ("Every key of a recipe is an option as well, such as --data.train a.jsonl; `python train.py --help` "
               "lists them all.")
