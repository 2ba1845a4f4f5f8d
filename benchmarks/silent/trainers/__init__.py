"""One file for each trainer that the exhibits are pointed at. TRAINERS: a column's name -> where its adapter is."""

from importlib import import_module

from silent.world import Trainer

TRAINERS = {
    "minisft": ("minisft", ""),
    "plain": ("plain", ""),
    "trl": ("trl", ""),
    "trl-unpacked": ("trl", "unpacked"),
    "trl-eager": ("trl", "eager"),
    "trl-defaults": ("trl", "defaults"),
    "trl-bf16-weights": ("trl", "bf16-weights"),
    "litgpt": ("litgpt", ""),
    "litgpt-defaults": ("litgpt", "defaults"),
    "litgpt-bf16-true": ("litgpt", "bf16-true"),
    "torchtune": ("torchtune", ""),
}


def open_trainer(name: str) -> Trainer:
    """The adapter of a column; its libraries are imported now."""
    module, variant = TRAINERS[name]
    return import_module(f"silent.trainers.{module}").open_trainer(name, variant)
