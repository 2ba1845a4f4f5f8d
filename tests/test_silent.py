"""benchmarks/silent: every exhibit is right about the clean loop and catches its fault; the oracle is transformers'."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from silent import oracle, page  # noqa: E402
from silent.exhibits import NAMES, open_exhibit, title  # noqa: E402
from silent.run import look  # noqa: E402
from silent.trainers import TRAINERS  # noqa: E402
from silent.trainers.plain import FAULTS, Plain  # noqa: E402
from silent.world import IGNORED, STOP, CannotError, Row, Trainer, World, said  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("silent"))


@pytest.mark.parametrize("name", NAMES)
def test_an_exhibit_is_right_about_the_clean_loop_and_catches_its_fault(name, world):
    clean, planted = look(name, Plain(), world), look(name, Plain(open_exhibit(name).FAULT), world)
    assert clean.state == "right", clean
    assert planted.state == "wrong", planted
    assert planted.size is None or not planted.size <= 20 * (clean.size or 0), (clean, planted)  # NaN is larger too


def test_every_fault_of_the_loop_is_caught_by_an_exhibit(world):
    """Those that no exhibit plants: they are caught by one that plants another."""
    planted = {fault for name in NAMES for fault in open_exhibit(name).FAULT.split()}
    others = {"skip": "resume_data", "other_template": "export_template"}
    assert planted | others.keys() == FAULTS.keys()
    for fault, name in others.items():
        assert look(name, Plain(fault), world).state == "wrong"


def test_every_exhibit_has_a_story_and_a_file_of_its_own():
    folder = ROOT / "benchmarks" / "silent" / "exhibits"
    assert {file.stem for file in folder.glob("*.py")} - {"__init__"} == set(NAMES)
    for name in NAMES:
        exhibit = open_exhibit(name)
        assert title(exhibit)[0].isupper(), name
        assert 200 < len(exhibit.__doc__) < 900, name
        assert exhibit.UNIT, name


@pytest.mark.parametrize("model", ["base", "tied", "tied_own"])
def test_the_oracle_is_transformers(model, world):
    transformers = pytest.importorskip("transformers")
    weights, config = oracle.load(world.model(model))
    right = transformers.LlamaForCausalLM.from_pretrained(world.model(model), dtype=torch.float64)
    row = oracle.rows([said("Is the bridge open?", "Because the steam is in a hurry to leave.")], world.tokenizer)[0]
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    assert torch.allclose(oracle.logits(ids[0], weights, config), right(ids).logits[0], atol=1e-5)  # rope is fp32 there
    loss = right(ids, labels=labels).loss
    assert float(oracle.mean_loss([row], weights, config)) == pytest.approx(loss.item(), abs=1e-6)
    loss.backward()
    found, expected = oracle.gradient([row], weights, config), dict(right.named_parameters())
    assert oracle.distance({name: expected[name].grad for name in expected},
                           {name: found[name] for name in expected}) < 1e-5


def test_the_oracle_renders_as_the_released_template(world):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.model())
    messages = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": " Is it open?\n"},
                {"role": "assistant", "content": "Yes."}]
    tokens = oracle.encode(messages, world.tokenizer)
    assert [token.id for token in tokens] == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert world.tokenizer.decode([t.id for t in tokens if t.trained], skip_special_tokens=False) == "Yes." + STOP


def test_the_gradient_is_told_by_the_first_update():
    """In NumPy, with AdamW as torch has it: bias-corrected moments of one step are g and g squared."""
    draw = np.random.default_rng(0)
    weight, g = draw.normal(size=(2, 5, 7))
    after = weight - 0.7 * (0.1 * g / (1 - 0.9)) / (np.sqrt(0.001 * g * g / (1 - 0.999)) + 0.3)
    told = oracle.gradient_told({"w": torch.tensor(weight)}, {"w": torch.tensor(after)}, lr=0.7, eps=0.3)["w"]
    # u = lr g / (|g| + eps) solved for g
    assert np.allclose(told.numpy(), g, rtol=1e-9)


def test_a_refusal_is_no_wrong_and_a_warning_is_told_from_silence(world):
    class Refuses(Trainer):
        def rows(self, job, world):
            raise CannotError("no such format")

    class Warns(Trainer):
        def rows(self, job, world):
            os.write(2, b"beware: the field `weight` is not read\n")
            tokens = oracle.encode([{**m, "weight": 1} for m in job.data[0]["messages"]], world.tokenizer)
            return [oracle.row(tokens)]

    class Mistaken(Trainer):
        def rows(self, job, world):
            raise IndexError("a bug")

    assert look("mask", Refuses(), world).state == "cannot"
    assert look("columns", Refuses(), world).state == "right"  # where a refusal is what is right
    found = look("turn_weight", Warns(), world)
    assert (found.state, found.size) == ("warned", 8)
    assert "the field `weight` is not read" in found.text
    assert look("mask", Mistaken(), world).text == "failed: IndexError: a bug"


def test_a_row_is_matched_whatever_a_trainer_adds(world):
    """A second BOS and another stop token do not move the mask that is read."""
    class Adds(Trainer):
        def rows(self, job, world):
            row = oracle.rows(job.data, world.tokenizer)[0]
            return [Row([row.ids[0], *row.ids, 3], [IGNORED, *row.labels, IGNORED])]

    for name in ("mask", "header", "stop", "multi_turn", "turn_weight"):
        assert look(name, Adds(), world).state == "right"
    assert look("double_bos", Adds(), world).size == 1


def silent(*arguments, code=0):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "silent"), *map(str, arguments)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_program_fills_the_matrix_column_by_column(tmp_path):
    file, html = tmp_path / "matrix.json", tmp_path / "matrix.html"
    chosen = ["--exhibit", "leak", "--exhibit", "header"]
    silent("--trainer", "plain", *chosen, "--json", file)
    printed = silent("--trainer", "plain", "--planted", *chosen, "--json", file, "--html", html)
    assert re.search(r"^leak +right +WRONG 126%$", printed, re.MULTILINE)
    assert re.search(r"^header +right +WRONG 4 tokens$", printed, re.MULTILINE)
    matrix = json.loads(file.read_text())
    assert list(matrix) == ["plain", "planted"]
    assert matrix["planted"]["exhibits"]["header"]["size"] == 4
    text = html.read_text()
    assert "WRONG 126%" in text
    assert "axolotl#3796" in text
    assert not re.search(r"<script|<link|<img|src=|url\(|https?:", text)


@pytest.mark.slow
def test_the_program_refuses_what_makes_no_sense():
    with pytest.raises(AssertionError, match="name a --trainer, or a --json file that has columns"):
        silent()
    with pytest.raises(AssertionError, match="faults are planted in the plain loop"):
        silent("--trainer", "trl", "--planted")
    listed = silent("--list")
    assert all(name in listed for name in (*NAMES, *TRAINERS))


def test_the_table_says_what_was_not_run():
    verdict = {"state": "wrong", "size": "not finite", "text": "", "seconds": 0}
    column = {"about": "", "versions": "v", "date": "d", "seconds": 1, "machine": "m"}
    matrix = {"a": column | {"exhibits": {"leak": verdict}}, "b": column | {"exhibits": {"mask": verdict}}}
    printed = page.text(matrix)
    assert re.search(r"^leak +WRONG not finite +not run$", printed, re.MULTILINE)
    assert "positions" not in printed


def test_documents_have_the_matrix_as_measured():
    matrix = json.loads((ROOT / "benchmarks/silent/matrix.json").read_text())
    others = ("minisft", "trl", "torchtune", "litgpt")
    assert page.markdown(matrix, (*others, "planted")) in (ROOT / "docs/silent-bugs.md").read_text()
    shown = ("leak", "accumulation", "truncation", "special_in_content", "bf16_masters", "held_out_packing",
             "export_template")
    readme = (ROOT / "README.md").read_text()
    assert page.markdown(matrix, others, shown) in readme
    for name in others:
        assert matrix[name]["versions"].split(",")[0].split()[1] in readme, f"the version of {name}"


@pytest.mark.slow
def test_minisft_is_right_in_every_exhibit(tmp_path):
    silent("--trainer", "minisft", "--json", tmp_path / "matrix.json")
    found = json.loads((tmp_path / "matrix.json").read_text())["minisft"]
    states = {name: verdict["state"] for name, verdict in found["exhibits"].items()}
    assert states == dict.fromkeys(NAMES, "right")
