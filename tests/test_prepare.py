"""`minisft prepare` as a user sees it: its output, its files, and one clear line for every mistake."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from oracles.tiny_llama import write_tiny_llama

from minisft.__main__ import main
from minisft.data.templates import load_templates
from minisft.reports.data_report import describe

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
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copytree(tiny, "model")
    shutil.copy(ORACLES / "conversations.jsonl", "chats.jsonl")
    Path("r.toml").write_text('[model]\npath = "model"\n[data]\ntrain = "chats.jsonl"\ntemplate = "llama3"\n'
                              'seq_len = 512\ncache = "cache"\n[batch]\npacks = 2\n')
    return tmp_path


def refused(capsys, *argv, code=2):
    """The error that the command prints: no traceback, and no half-written store is left."""
    assert main(["prepare", "r.toml", *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    stores = [folder for folder in Path("cache").glob("*") if folder.is_dir()]
    assert all((folder / "report.json").exists() for folder in stores)
    return err


# As a program

def test_the_command_reports_dumps_and_writes_json(here):
    command = [sys.executable, "-m", "minisft", "prepare", "r.toml", "--dump", "dump.jsonl", "--data.overlong", "drop",
               "--json", "report.json", "--train.epochs=2", "--optim.warmup_steps=0"]
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

    head, chats, *rest = done.stdout.splitlines()
    assert head.split() == ["source", "read", "kept", "turns", "tokens", "trained", "share", "longest", "median",
                            "tok/word"]
    lengths = [len(document["ids"]) for document in DOCUMENTS]
    per_word = report["train"][0]["content_tokens"] / report["train"][0]["words"]
    assert chats.split() == ["chats", "32", "32", f"{report['train'][0]['turns']}", f"{tokens:,}", f"{targets:,}",
                             f"{targets / tokens:.1%}", str(max(lengths)), str(round(statistics.median(lengths))),
                             f"{per_word:.2f}"]
    assert rest[-6] == (f"packs    {report['packs']} of 512 tokens, {report['packing_efficiency']:.2%} full, "
                        "template llama3")
    assert rest[-5].startswith(f"steps    {report['steps_per_epoch']} per epoch, {report['total_steps']} in total, of "
                               f"2 packs; {targets / report['steps_per_epoch']:,.0f} trained tokens each (")
    assert rest[-4].startswith("compute  about ")
    assert rest[-3].startswith("checks   passed: one beginning-of-text token per document if ")


@pytest.mark.parametrize(("warmup", "warned"), [(10, False), (11, True)])
def test_a_warmup_that_never_ends_is_said(here, capsys, warmup, warned):
    assert main(["prepare", "r.toml", "--train.max_steps", "11", "--train.epochs", "20", "--optim.warmup_steps",
                 str(warmup)]) == 0
    assert ("warning  optim.warmup_steps = 11 is not less than the total" in capsys.readouterr().out) == warned


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
    options = " [--section.key value ...] [--dump FILE] [--json FILE] [--verify]" if argv[0] == "prepare" else ""
    for part in (f"minisft prepare RECIPE{options}", "--data.train", "minisft train --help"):
        assert part in " ".join(text.split())


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


def test_verifying_finds_one_flipped_bit_and_mends_it(here, capsys):
    Path("chats.jsonl").write_text(GOOD * 2000)
    assert main(["prepare", "r.toml", "--dump", "before.jsonl"]) == 0
    plain = capsys.readouterr().out
    Path("more.jsonl").write_text(GOOD)
    assert main(["prepare", "r.toml", "--data.eval", "chats.jsonl,more.jsonl", "--verify"]) == 0
    assert capsys.readouterr().out.endswith("\nverified 2,001 documents of 2 files: as they were written\n")
    shutil.rmtree("cache")
    assert main(["prepare", "r.toml"]) == 0
    capsys.readouterr()
    (masks,) = Path("cache").glob("*/trained.bin")
    whole = bytearray(masks.read_bytes())
    whole[len(whole) // 2000 * 1001] ^= 1
    masks.write_bytes(whole)
    assert main(["prepare", "r.toml", "--dump", "after.jsonl"]) == 4
    err = capsys.readouterr().err
    message = f"{masks.parent}: damaged (document 1,002 of 2,000 is not as it was written); it is made again from its "
    assert err == f"error: {message}file when it is opened\n"
    os.rename(masks.parent.with_suffix(".damaged"), masks.parent)
    assert main(["prepare", "r.toml", "--verify", "--dump", "after.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert out == plain + "verified 2,000 documents of 1 file: as they were written\n"
    assert err.startswith(message)
    assert Path("after.jsonl").read_bytes() == Path("before.jsonl").read_bytes()


def chats_of(counts):
    """Conversations whose answers have so many sentences."""
    return "".join(GOOD.replace("Hello!", f"Hello {i}. " + "It is on. " * n) for i, n in enumerate(counts))


@pytest.fixture
def mixture(here):
    """A recipe with two sources, replayed text, a held-out part and a held-out file, some of it too long."""
    Path("long.jsonl").write_text(chats_of([1, 3, 9, 20, 2, 150, 4, 80, 7] * 9 + [200]))
    Path("text.jsonl").write_text("".join(f'{{"text": "{i} the end of it"}}\n' for i in range(50)))
    Path("r.toml").write_text('[model]\npath = "model"\n[data]\ntemplate = "llama3"\ncache = "cache"\nseq_len = 300\n'
                              'eval_fraction = 0.2\nreplay = "text.jsonl"\nreplay_ratio = 0.1\neval = "chats.jsonl"\n'
                              'train = ["chats.jsonl", {path = "long.jsonl", weight = 2.5}]\n[batch]\npacks = 2\n')
    assert main(["prepare", "r.toml", "--dump", "d.jsonl", "--json", "j.json"]) == 0
    dumped = [json.loads(line) for line in Path("d.jsonl").read_text(encoding="utf-8").splitlines()]
    return dumped, json.loads(Path("j.json").read_text(encoding="utf-8"))


def test_the_figures_of_a_source_are_those_of_the_documents_in_the_dump(mixture):
    dumped, report = mixture
    assert [source["name"] for source in report["train"] + report["replay"]] == ["chats", "long", "text"]
    for source in report["train"] + report["replay"]:
        documents = [document for document in dumped if document["source"] == source["path"]]
        records = [json.loads(line) for line in Path(source["path"]).read_text(encoding="utf-8").splitlines()]
        lengths = [len(document["ids"]) for document in documents]
        assert (source["read"], source["kept"]) == (len(records), len(documents))
        assert source["read"] == source["kept"] + sum(source["skipped"].values())
        assert source["turns"] == sum(len(records[d["line"] - 1].get("messages", "1")) for d in documents)
        assert (source["tokens"], source["longest"]) == (sum(lengths), max(lengths))
        assert source["median"] == statistics.median(lengths)
        assert source["target_tokens"] == sum(sum(document["trained"]) for document in documents)
        assert source["target_share"] == pytest.approx(source["target_tokens"] / source["tokens"])
        assert source["largest_id"] == max(max(document["ids"]) for document in documents)
    assert (report["documents"], report["tokens"]) == (len(dumped), sum(len(d["ids"]) for d in dumped))
    held = {source["name"]: source["read"] for source in report["eval"]}
    assert held == {"chats": 32, **{f"heldout-{s['name']}": s["skipped"]["held out"] for s in report["train"]}}
    assert report["train"][1]["skipped"]["over length"] > 10


def test_the_bars_count_the_documents_of_each_length(mixture, capsys):
    dumped, report = mixture
    assert [bucket["to"] for bucket in report["lengths"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 512, 1024, 2048][
        : len(report["lengths"])]
    lengths = Counter(len(document["ids"]) for document in dumped)
    for bucket in report["lengths"]:
        assert bucket["kept"] == sum(n for length, n in lengths.items() if bucket["from"] <= length <= bucket["to"])
    assert sum(bucket["kept"] for bucket in report["lengths"]) == len(dumped)
    too_long = {bucket["from"]: bucket["too_long"] for bucket in report["lengths"] if bucket["too_long"]}
    assert min(too_long) > 300
    assert sum(too_long.values()) == sum(source["skipped"]["over length"] for source in report["train"])

    assert main(["prepare", "r.toml"]) == 0
    out = capsys.readouterr().out
    most = max(max(bucket["kept"], bucket["too_long"]) for bucket in report["lengths"])
    bars = {int(low.replace(",", "")): (int(n.replace(",", "")), len(bar)) for low, n, bar in
            re.findall(r"^ +([\d,]+) - [\d,]+ +([\d,]+)  ([█▏▎▍▌▋▊▉]*)", out, re.MULTILINE)}
    for bucket in report["lengths"]:
        count = bucket["kept"] + bucket["too_long"]
        if bucket["from"] in bars:
            assert bars[bucket["from"]] == (count, -(-36 * count // most))
        else:
            assert count == 0
    assert out.index("data.seq_len = 300") < out.index(f"{min(too_long):,} - ")

    assert main(["prepare", "r.toml", "--data.overlong", "truncate"]) == 0
    counts = re.findall(r"^ +[\d,]+ - [\d,]+ +([\d,]+)  [█▏▎▍▌▋▊▉]*", capsys.readouterr().out, re.MULTILINE)
    assert sum(int(count) for count in counts) == len(dumped) + sum(too_long.values()), "each once, cut or not"


def test_the_mixture_is_stated_exactly(mixture, capsys):
    _, report = mixture
    trained = sum(source["epoch"]["target_tokens"] for source in report["train"] + report["replay"])
    for source in report["train"] + report["replay"]:
        assert source["epoch"]["target_share"] == pytest.approx(source["epoch"]["target_tokens"] / trained)
    assert (report["epoch_target_tokens"], report["replay_ratio"]) == (trained, 0.1)
    assert report["replay_share"] == pytest.approx(0.1, abs=0.01)
    assert report["target_tokens_per_step"]["mean"] == pytest.approx(trained / report["steps_per_epoch"])
    assert report["packing_efficiency"] == pytest.approx(report["epoch_tokens"] / (report["packs"] * 300))

    chats, long, text = report["train"] + report["replay"]
    assert main(["prepare", "r.toml", "--data.eval_fraction", "0.2"]) == 0
    out = capsys.readouterr().out
    assert chats["epoch"]["documents"] == chats["kept"]
    more = long["epoch"]["documents"] - 2 * long["kept"]
    assert 0 < more < long["kept"] == long["epoch"]["different_documents"]
    assert f"    weight 2.5: all {long['kept']} documents twice, and {more} again, drawn anew each epoch\n" in out
    assert 2 < text["weight"] < 3
    assert f"    weight {text['weight']:.4g}: all 50 documents twice, and " in out
    assert f"\nreplay is {report['replay_share']:.2%} of the tokens (data.replay_ratio = 0.1)\n" in out
    assert "    also in the training data, exactly or nearly: " in out
    assert main(["prepare", "r.toml", "--data.train", "long.jsonl", "--data.replay_ratio", "0.01"]) == 0
    assert re.search(r"    weight 0\.\d+: \d+ of 50 documents in epoch 1, drawn anew each epoch\n",
                     capsys.readouterr().out)


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_columns_are_aligned_and_fit_however_large_the_figures(mixture, columns, monkeypatch):
    _, report = mixture
    report["train"][0] |= {"name": "a-name-that-somebody-made-much-too-long", "read": 51_760, "tokens": 123_456_789,
                           "target_tokens": 10_000_000}
    monkeypatch.setenv("COLUMNS", str(columns))
    first, *rest = describe(report).split("\n\n")
    table = [line for line in first.splitlines() if not line.startswith("    ") and not line.endswith(":")]
    assert len(table) == 7
    assert len({len(line) for line in table}) == 1
    assert len(table[0]) <= columns
    assert {len(line.split()) for line in table} == {10}
    assert table[1].split()[1:6:2] == ["51,760", f"{report['train'][0]['turns']}", "10.0M"]
    assert "123.5M" in table[1]
    # no column runs into its neighbour: the blanks between them stand under each other
    blank = [all(line[i] == " " for line in table) for i in range(len(table[0]))]
    assert sum(b and not a for a, b in zip([False, *blank], blank, strict=False)) == 9
    assert all(len(line) <= columns for part in rest for line in part.splitlines())


def test_the_compute_is_estimated_where_the_network_is_known(here, capsys):
    assert main(["prepare", "r.toml", "--json", "j.json"]) == 0
    plain = json.loads(Path("j.json").read_text())
    assert plain["flops"] == pytest.approx(3 * plain["flops_per_epoch"])
    assert f"about {plain['flops']:.3g} FLOPs in matrix products, without recomputation" in capsys.readouterr().out
    assert main(["prepare", "r.toml", "--json", "j.json", "--parallel.activation_checkpointing", "full"]) == 0
    assert 1.1 < json.loads(Path("j.json").read_text())["flops"] / plain["flops"] < 4 / 3
    assert "with full recomputation" in capsys.readouterr().out
    Path("model/config.json").unlink()
    assert main(["prepare", "r.toml", "--json", "j.json"]) == 0
    assert json.loads(Path("j.json").read_text())["flops"] is None
    assert "compute  not estimated: there is no config.json" in capsys.readouterr().out


def test_a_tokenizer_of_another_model_is_found_out(here, capsys):
    shape = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(shape | {"vocab_size": 318}))
    assert ("chats.jsonl: token id 318 is past the model's vocabulary of 318; model/tokenizer.json belongs to another "
            "model") in refused(capsys)


def test_a_terminal_without_bars_gets_question_marks(here):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "minisft", "prepare", "r.toml"], env=environment, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0
    assert "????" in done.stdout


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
    assert ", template llama3\n" in capsys.readouterr().out
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
    ("\x00", "error: chats.jsonl: this is not JSON: it begins '\\x00' (remedy: "),
])
def test_bad_data(here, capsys, content, message):
    Path("chats.jsonl").write_text(content)
    assert refused(capsys, "--dump", "d.jsonl").startswith(message)
    assert not Path("d.jsonl").exists()


@pytest.mark.parametrize(("argv", "message"), [
    (["--data.train", "missing.jsonl"], "data.train: missing.jsonl: No such file or directory"),
    (["--data.train", "model"], "if this is no data, name a glob that leaves it out, such as *.json)"),
    (["--data.train", "cache"], "data.train: cache: names no data file; there are none (remedy: name a file, a folder"),
    (["--data.train", "chats.jsonl,missing.jsonl"], "missing.jsonl: No such file or directory"),
    (["--data.general", "missing.jsonl"], "data.general: missing.jsonl: No such file or directory"),
    (["--data.eval", "missing.jsonl"], "data.eval: missing.jsonl: No such file or directory"),
    (["--data.format", "nope"], "command line: --data.format: expected auto|alpaca|dolly|"),
    (["--data.template", "nope"], f"data.template: no template is called 'nope'; choose with data.template: {CHOICES}"),
    (["--data.template", ""],
     f"model: does not say which chat template the model uses; choose with data.template: {CHOICES}; or write your"),
    (["--data.template", "chatml"], "template chatml: system has <|im_start|>, which is not a special token of model"),
    (["--data.templates", "no.toml"], "no.toml: data.templates cannot be read: "),
    (["--data.seq_length", "7"], "--data.seq_length: unknown option (did you mean --data.seq_len?)"),
    (["--model.path", "nowhere"], "nowhere: no such folder; model.tokenizer, or else model.path, is a folder with"),
    (["--dmup", "x"], "--dmup: unknown option"),
    (["--data.overlong", "error", "--data.seq_len", "30"], "tokens, but data.seq_len is 30 ("),
    (["--data.eval", "empty.jsonl"], "no conversation is left to evaluate on:\n  empty.jsonl: 0 read"),
    (["--data.seq_len", "2"], "no conversation is left to train on:\n  chats.jsonl: 32 read; over length: 32 (first: "),
])
def test_bad_settings(here, capsys, argv, message):
    Path("empty.jsonl").write_text("")
    Path("cache").mkdir()
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
@pytest.mark.parametrize(("path", "reason"), [("no/such/folder", "folder no/such does not exist; create it first"),
                                              (".", "is a folder; name a file")])
def test_a_file_that_cannot_be_written_is_said_before_any_work(here, capsys, option, path, reason):
    assert refused(capsys, option, path) == f"error: {option} {path}: {reason}\n"
    assert not Path("cache").exists()


@pytest.mark.parametrize("key", ["data.train", "data.eval", "data.general", "data.replay", "data.templates",
                                 "model.path", "model.tokenizer"])
@pytest.mark.parametrize("path", ["pipe", "/dev/zero"])
def test_only_regular_files_are_opened(here, capsys, key, path):
    os.mkfifo("pipe")
    assert refused(capsys, f"--{key}={path}") == (
        f"error: {path}: is a device, a pipe or a socket; name a regular file\n")


def test_a_cache_that_cannot_be_made_is_an_input_output_error(here, capsys):
    err = refused(capsys, "--data.cache", "chats.jsonl/cache", code=4)
    assert "chats.jsonl/cache" in err
