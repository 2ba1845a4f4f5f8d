"""`minisft prepare` as a person meets it: its output, its files, and one clear line for everything that is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from oracles.tiny_llama import write_tiny_llama

from minisft.__main__ import main
from minisft.data.templates import load_templates

ORACLES = Path(__file__).parent / "oracles"
DOCUMENTS = json.loads((ORACLES / "trl_curve.json").read_text(encoding="utf-8"))["documents"]
CHOICES = ", ".join(load_templates())
GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}\n'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def here(tmp_path, monkeypatch, tiny):
    """A current directory with a model, the oracle's conversations and a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    shutil.copytree(tiny, "model")
    shutil.copy(ORACLES / "conversations.jsonl", "chats.jsonl")
    Path("r.toml").write_text('[model]\npath = "model"\n[data]\ntrain = "chats.jsonl"\ntemplate = "llama3"\n'
                              'seq_len = 512\ncache = "cache"\n[batch]\npacks = 2\n')
    return tmp_path


def refused(capsys, *argv, code=2):
    """What the command says on its way out, in which no traceback may stand and after which no half store may lie."""
    assert main(["prepare", "r.toml", *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    stores = [folder for folder in Path("cache").glob("*") if folder.suffix != ".lock"]
    assert all((folder / "report.json").exists() for folder in stores)
    return err


# As a program

def test_the_command_reports_dumps_and_writes_json(here):
    command = [sys.executable, "-m", "minisft", "prepare", "r.toml", "--dump", "dump.jsonl", "--data.overlong", "drop",
               "--json", "report.json", "--train.epochs=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")

    dumped = [json.loads(line) for line in Path("dump.jsonl").read_text(encoding="utf-8").splitlines()]
    assert dumped == [{"source": "chats.jsonl", "line": line, **document} for line, document in enumerate(DOCUMENTS, 1)]
    assert {type(t) for t in dumped[0]["trained"]} == {int}

    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    tokens, targets = (sum(map(count, DOCUMENTS)) for count in (lambda d: len(d["ids"]), lambda d: sum(d["trained"])))
    assert (report["template"], report["documents"], report["eval"]) == ("llama3", 32, [])
    assert (report["tokens"], report["target_tokens"], report["seq_len"]) == (tokens, targets, 512)
    assert report["packing_efficiency"] == pytest.approx(tokens / (report["packs"] * 512))
    assert report["steps_per_epoch"] == -(-report["packs"] // 2)
    assert report["total_steps"] == 2 * report["steps_per_epoch"]
    assert (report["train"][0]["read"], report["train"][0]["kept"], report["train"][0]["skipped"]) == (32, 32, {})

    head, chats, last = done.stdout.splitlines()
    assert head.split() == ["source", "read", "kept", "turns", "tokens", "trained", "share"]
    assert chats.split() == ["chats", "32", "32", f"{report['train'][0]['turns']}", f"{tokens:,}", f"{targets:,}",
                             f"{targets / tokens:.1%}"]
    assert last == (f"template llama3; {report['packs']} packs of 512 tokens, {report['packing_efficiency']:.2%} full; "
                    f"{report['steps_per_epoch']} steps an epoch, {report['total_steps']} in all")


def test_a_user_error_leaves_the_program_with_2_and_one_message(here):
    Path("chats.jsonl").write_text(GOOD + '{"messages": \n')
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-m", "minisft", "prepare", "r.toml"], env=environment, capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: chats\.jsonl:2: bad JSON: .*\(remedy: .*\)\n", done.stderr)


@pytest.mark.parametrize("argv", [["--help"], ["prepare", "--help"]])
def test_help_shows_the_options_and_speaks_of_recipe_keys(capsys, argv):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 0
    text = capsys.readouterr().out
    usage = "prepare RECIPE [--section.key value ...] [--dump FILE] [--json FILE]"
    for part in (usage, "--data.train", "train.py --help"):
        assert part in text


def test_no_command_and_unknown_commands_are_usage_errors(capsys):
    for argv, message in (([], "arguments are required: COMMAND"), (["prepaer"], "invalid choice: 'prepaer'")):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 2
        assert message in capsys.readouterr().err


# What is reported

def test_everything_left_out_is_named(here, capsys):
    long = GOOD.replace("Hello!", "lo" * 600)
    Path("chats.jsonl").write_text(GOOD * 3 + long + GOOD.replace("Hello!", " ") + "{\n")
    assert main(["prepare", "r.toml", "--data.skip_bad", "true", "--data.eval", "chats.jsonl"]) == 0
    out = capsys.readouterr().out
    for line in ("left out, no answer: 1 (first: chats.jsonl:5: ' ')", "left out, bad JSON: 1 (first: chats.jsonl:6: ",
                 "left out, over length: 1 (first: chats.jsonl:4)"):
        assert out.count(line) == 2, "in the training data and in the held-out data"
    assert re.search(r"trained tokens lost to the length limit: 1,?\d+", out)
    assert main(["prepare", "r.toml", "--data.skip_bad", "true", "--data.overlong", "truncate"]) == 0
    assert "cut to 512 tokens: 1" in capsys.readouterr().out


def test_each_file_has_its_own_template_and_format(here, capsys):
    Path("a.json").write_text('[{"instruction": "Add.", "input": "1 2", "output": "3"}]')
    Path("r.toml").write_text('[model]\npath = "model"\n[data]\ntemplate = "llama3"\ncache = "cache"\n'
                              'train = ["chats.jsonl", {path = "a.json", format = "alpaca", template = "alpaca"}]')
    assert main(["prepare", "r.toml", "--dump", "d.jsonl"]) == 0
    *first, last = map(json.loads, Path("d.jsonl").read_text().splitlines())
    assert [document["ids"] for document in first] == [document["ids"] for document in DOCUMENTS]
    assert (last["source"], last["line"], last["ids"][0], last["ids"][-1]) == ("a.json", 1, 309, 318)
    assert sum(last["trained"]) == 2
    assert 315 not in last["ids"], "Alpaca has no <|start_header_id|>"


def test_a_template_is_recognised_from_the_models_folder(here, capsys):
    jinja = ("{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
             "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
    Path("model/chat_template.jinja").write_text(jinja)
    assert main(["prepare", "r.toml", "--data.template", "", "--dump", "d.jsonl"]) == 0
    assert "template llama3; " in capsys.readouterr().out
    assert json.loads(Path("d.jsonl").read_text().splitlines()[7])["ids"] == DOCUMENTS[7]["ids"]


# What is refused

@pytest.mark.parametrize(("content", "message"), [
    (GOOD * 3 + '{"messages": [}\n', "error: chats.jsonl:4: bad JSON: "),
    ("[" + GOOD + "," + GOOD + ', {"mess',
     "error: chats.jsonl:3: the JSON array is cut off: the file ends inside the record that starts at byte "),
    ('{"question": "x"}\n', "error: chats.jsonl:1: no format matches a record with the fields question: none of ["),
    ("", "error: no conversation is left to train on:\n  chats.jsonl: 0 read; the file is empty"),
    ("[]", "error: no conversation is left to train on:\n  chats.jsonl: 0 read; the file is empty"),
    (GOOD.replace("Hello!", ""),
     "error: no conversation is left to train on:\n  chats.jsonl: 1 read; no answer: 1 (first: chats.jsonl:1: ''"),
    ("\x00", "error: chats.jsonl:1: bad JSON: "),
])
def test_bad_data(here, capsys, content, message):
    Path("chats.jsonl").write_text(content)
    assert refused(capsys, "--dump", "d.jsonl").startswith(message)
    assert not Path("d.jsonl").exists()


@pytest.mark.parametrize(("argv", "message"), [
    (["--data.train", "missing.jsonl"], "missing.jsonl: No such file or directory"),
    (["--data.train", "model"], "model: Is a directory"),
    (["--data.train", "chats.jsonl,missing.jsonl"], "missing.jsonl: No such file or directory"),
    (["--data.eval", "missing.jsonl"], "missing.jsonl: No such file or directory"),
    (["--data.format", "nope"], "command line: --data.format: expected auto|alpaca|dolly|"),
    (["--data.template", "nope"], f"data.template: no template is called 'nope'; choose with data.template: {CHOICES}"),
    (["--data.template", ""],
     f"model: does not say which chat template the model uses; choose with data.template: {CHOICES}; or write your"),
    (["--data.template", "chatml"], "template chatml: system has <|im_start|>, which is not a special token of model"),
    (["--data.templates", "no.toml"], "no.toml: data.templates cannot be read: "),
    (["--data.seq_length", "7"], "--data.seq_length: unknown option (did you mean --data.seq_len?)"),
    (["--model.path", "nowhere"], "nowhere: No such file or directory; model.tokenizer is a folder with"),
    (["--dmup", "x"], "--dmup: unknown option"),
    (["--data.overlong", "error", "--data.seq_len", "30"], "tokens, but data.seq_len is 30 ("),
    (["--data.seq_len", "2"], "no conversation is left to train on:\n  chats.jsonl: 32 read; over length: 32 (first: "),
])
def test_bad_settings(here, capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_a_recipe_with_an_unknown_key(here, capsys):
    Path("r.toml").write_text('[model]\npath = "model"\n[data]\ntrian = "chats.jsonl"')
    assert "r.toml: data.trian: unknown key (did you mean data.train?)" in refused(capsys)


def test_a_damaged_tokenizer(here, capsys):
    content = Path("model/tokenizer.json").read_bytes()
    for damaged in (content[:-100], b"{}", b""):
        Path("model/tokenizer.json").write_bytes(damaged)
        assert refused(capsys).startswith("error: model/tokenizer.json: not a tokenizer.json (")


@pytest.mark.parametrize("option", ["--dump", "--json"])
@pytest.mark.parametrize(("path", "reason"), [("no/such/folder", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_written_is_an_input_output_error(here, capsys, option, path, reason):
    err = refused(capsys, option, path, code=4)
    assert reason in err
    assert repr(path) in err


def test_a_cache_that_cannot_be_made_is_an_input_output_error(here, capsys):
    err = refused(capsys, "--data.cache", "chats.jsonl/cache", code=4)
    assert "chats.jsonl/cache" in err
