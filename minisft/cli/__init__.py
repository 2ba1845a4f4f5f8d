"""The commands around a training run, a file each: its options, and what it prints. `minisft --help` lists them."""

import argparse


def add_recipe_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, help: str,
                       usage: str = "[options]") -> argparse.ArgumentParser:
    """A command that reads a recipe, and takes every key of it as an option."""
    return commands.add_parser(
        name, help=help, usage=f"minisft {name} RECIPE [--section.key value ...] {usage}", allow_abbrev=False,
        epilog="Every key of a recipe is an option too, such as --data.train a.jsonl; `python train.py --help` lists "
        "them all.")
