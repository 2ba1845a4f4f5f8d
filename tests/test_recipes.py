"""Every shipped recipe can be prepared and planned: with the sample data of the package, the shape of its own network,
and a small tokenizer that has Llama-3's control tokens."""

import json
import re
from importlib import resources
from pathlib import Path

import pytest

from minisft import config_io
from minisft.__main__ import main
from minisft.model.llama_config import PRESETS

RECIPES = Path(str(resources.files("minisft"))) / "recipes"
SAMPLE = RECIPES / "sample"
NETWORKS = {"llama3-8b": "llama-3-8b", "llama3-8b-turkish": "llama-3-8b", "llama3.2-1b": "llama-3.2-1b",
            "llama3.2-3b": "llama-3.2-3b", "llama3-70b": "llama-3-70b",
            "llama3-8b-lora": "llama-3-8b", "llama3-8b-qlora": "llama-3-8b"}
GPUS = {"llama3.2-1b": ("1", "rtx4090"), "llama3.2-3b": ("1", "rtx4090"), "llama3-70b": ("64", "h100"),
        "llama3-8b-lora": ("1", "a100-40"), "llama3-8b-qlora": ("1", "rtx4090")}


def options(name: str, base: Path, folder: Path) -> list[str]:
    """The recipe with the sample's files in place of the user's."""
    config = config_io.load([name])
    (folder / "config.json").write_text(json.dumps(PRESETS[NETWORKS[name]].to_dict(dtype="bfloat16")))
    sources = {key: ",".join(str(SAMPLE / Path(source.path).name) for source in getattr(config.data, key))
               for key in ("train", "replay") if getattr(config.data, key)}
    return [name, *(text for key, paths in sources.items() for text in (f"--data.{key}", paths)),
            "--model.path", str(folder), "--model.tokenizer", str(base),
            "--data.cache", str(folder), "--data.eval_fraction", "0.2"]


@pytest.mark.parametrize("name", NETWORKS)
def test_prepare(name, base, tmp_path):
    """No conversation of the sample is left out, but for those held out."""
    given = options(name, base, tmp_path)
    assert main(["prepare", *given, "--json", str(tmp_path / "report.json")]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    files = {path for text in given if text.startswith(str(SAMPLE)) for path in text.split(",")}
    records = sum(len(Path(file).read_text(encoding="utf-8").splitlines()) for file in files)
    assert found["documents"] + sum(source["kept"] for source in found["eval"]) == records


@pytest.mark.parametrize("name", NETWORKS)
def test_plan(name, base, tmp_path, capsys):
    """Each fits on the GPUs that its comment names."""
    gpus, gpu = GPUS.get(name, ("8", "h100"))
    assert main(["plan", *options(name, base, tmp_path), "--gpus", gpus, "--gpu", gpu]) == 0
    told = capsys.readouterr().out
    chosen = config_io.load([name]).parallel.activation_checkpointing
    columns = re.search(r"recomputing +none +selective +full", told)
    fits = re.search(r"with 1 packs in a pass +(fits|does not) +(fits|does not) +(fits|does not)", told)
    assert columns
    assert fits[1 + ("none", "selective", "full").index(chosen)] == "fits"


def test_all_are_tested():
    demos = {"demo", "demo-base", "round-1", "round-2"}
    assert set(config_io.shipped_recipes()) - demos == set(NETWORKS)


def test_a_recipe_without_its_files_says_what_to_give(capsys):
    assert main(["prepare", "llama3-8b"]) == 2
    assert "Meta-Llama-3-8B" in capsys.readouterr().err
