"""The configuration: the meaning of a recipe and a command line; all mistakes are reported at once, with their places.

The oracle for TOML is `tomllib`; for the round trip it is equality of dataclasses.
"""

import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft import config_io
from minisft.cli import train_command
from minisft.config import Config, RunConfig, Source
from minisft.config_io import help_text, load, to_toml
from minisft.errors import UserError

MINIMAL = '[model]\npath = "base"\n[data]\ntrain = "a.jsonl"\n'


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe `mine.toml` into the current directory and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")

    def write(text: str = MINIMAL, name: str = "mine.toml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def complaints(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(list(argv))
    head, *lines = str(caught.value).split("\n")
    assert head == f"the configuration has {len(lines)} problem{'s' if len(lines) > 1 else ''}:"
    return [line.strip() for line in lines]


# What a configuration means

def test_defaults_are_the_contract(recipe):
    config = load([recipe()])
    assert (config.data.format, config.data.train_on, config.data.overlong) == ("auto", "assistant", "drop")
    assert (config.data.seq_len, config.data.shuffle, config.data.template) == (2048, True, "")
    assert (config.batch.packs, config.batch.micro_packs) == (32, 1)
    assert (config.train.epochs, config.train.max_steps) == (3, None)
    assert (config.train.seed, config.train.precision) == (0, "bf16")
    optim = config.optim
    assert (optim.lr, optim.schedule, optim.warmup_steps, optim.min_lr_ratio) == (2e-5, "cosine", 100, 0.0)
    assert (optim.weight_decay, optim.betas, optim.clip_norm) == (0.0, (0.9, 0.95), 1.0)
    assert (config.parallel.shard, config.parallel.replicate, config.eval.every) == (0, 1, 0)


def test_defaults_that_depend_on_other_keys_are_filled_in(recipe):
    config = load([recipe(), "--data.format", "alpaca", "--data.template", "llama3"])
    assert (config.model.init, config.model.tokenizer, config.run.dir) == ("pretrained", "base", "runs/mine")
    assert config.data.cache == "/caches/minisft"
    assert config.data.train == (Source("a.jsonl", format="alpaca", template="llama3", name="a"),)


def test_cache_defaults_to_the_home_folder(recipe, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert load([recipe()]).data.cache == "/home/me/.cache/minisft"


@pytest.mark.parametrize(("option", "text", "expected"), [
    ("optim.lr", "1e-5", 1e-5), ("optim.lr", "1", 1.0), ("optim.lr", "0", 0.0), ("train.epochs", "1_000", 1000),
    ("train.max_steps", "7", 7), ("train.max_steps", "none", None), ("optim.betas", "0.8,0.99", (0.8, 0.99)),
    ("data.shuffle", "false", False), ("data.skip_bad", "true", True), ("run.dir", "out=1", "out=1"),
    ("data.template", "true", "true"), ("data.template", "1", "1"), ("model.tokenizer", "none", "none"),
])
def test_text_on_the_command_line_follows_the_type_of_the_key(recipe, option, text, expected):
    section, leaf = option.split(".")
    for argv in ([f"--{option}", text], [f"--{option}={text}"]):
        value = getattr(getattr(load([recipe(), *argv]), section), leaf)
        assert value == expected
        assert type(value) is type(expected)


@pytest.mark.parametrize(("option", "text", "expected"), [
    ("optim.betas", "[0.9, 0.999]", (0.9, 0.999)), ("lora.targets", '["q_proj", "k_proj"]', ("q_proj", "k_proj")),
    ("data.ignore", "[a]", ("[a]",)), ("data.ignore", "images, id", ("images", "id")), ("data.ignore", "[]", ()),
])
def test_lists_on_the_command_line_may_be_written_as_in_toml(recipe, option, text, expected):
    section, leaf = option.split(".")
    assert getattr(getattr(load([recipe(), f"--{option}", text, "--lora.rank", "1"]), section), leaf) == expected
    sources = load([recipe(), "--data.train", '["a,b.jsonl", {path = "c", weight = 2}]']).data.train
    assert [(source.path, source.weight) for source in sources] == [("a,b.jsonl", 1.0), ("c", 2.0)]


def test_command_line_wins_over_the_recipe_and_toml_ints_are_floats(recipe):
    name = recipe(MINIMAL + "[optim]\nlr = 1\nbetas = [0, 0.5]\n")
    optim = load([name]).optim
    assert (optim.lr, optim.betas) == (1.0, (0.0, 0.5))
    assert type(optim.lr) is float
    assert type(optim.betas[0]) is float
    assert load([name, "--optim.lr", "3e-6"]).optim.lr == 3e-6


def test_three_ways_to_write_sources(recipe):
    for value in ('"a.jsonl"', '["a.jsonl"]', '[{path = "a.jsonl"}]', '{path = "a.jsonl"}'):
        assert load([recipe(f"[data]\ntrain = {value}\n"), "--model.path", "m"]).data.train[0].path == "a.jsonl"
    tables = '[[data.train]]\npath = "x/a.json"\nweight = 2\n[[data.train]]\npath = "b"\nformat = "text"\n'
    assert load([recipe(tables), "--model.path", "m"]).data.train == (
        Source("x/a.json", format="auto", weight=2.0, name="a"), Source("b", format="text", name="b"))
    assert [s.path for s in load([recipe(), "--data.train", "b c.json,d"]).data.train] == ["b c.json", "d"]
    assert load([recipe(MINIMAL + 'eval = "e.json"\n'), "--data.eval="]).data.eval == ()


def test_source_names_are_made_unique_and_respect_given_ones(recipe):
    sources = '["x/a.jsonl.gz", "y/a.json", {path = "c", name = "a-2"}, "z/.a.txt", ".."]'
    config = load([recipe(f"[data]\ntrain = {sources}\n"), "--model.path", "m", "--data.eval", "a.json"])
    assert [source.name for source in config.data.train] == ["a", "a-3", "a-2", "a-4", "data"]
    assert [source.name for source in config.data.eval] == ["a"]


def test_replayed_sources_inherit_like_the_trained_ones_and_have_names_of_their_own(recipe):
    text = '[model]\npath = "m"\n[data]\ntrain = "a.jsonl"\nreplay = ["a.txt", {path = "b", weight = 2}]\n'
    config = load([recipe(text), "--data.template", "llama3"])
    assert config.data.replay == (Source("a.txt", format="auto", template="llama3", name="a-2"),
                                  Source("b", format="auto", template="llama3", name="b", weight=2.0))
    assert config.data.replay_ratio == 0.05
    assert_round_trip(config)
    assert load([recipe(), "--data.eval_fraction", "0.1", "--eval.every", "5"]).eval.every == 5


@pytest.mark.parametrize(("text", "meaning"), [("true", "exact"), ("false", "none"), ("'exact'", "exact"),
                                               ("'near'", "near"), ("'true'", "exact")])
def test_a_boolean_for_repetitions_means_exact_ones(recipe, text, meaning):
    assert load([recipe(f"{MINIMAL}dedup = {text}\n")]).data.dedup == meaning
    assert load([recipe(), "--data.dedup", text.strip("'")]).data.dedup == meaning


def test_shipped_recipes_are_found_by_name_and_none_means_demo(recipe, tmp_path, monkeypatch):
    shipped = {name: tmp_path / "shipped" / f"{name}.toml" for name in ("demo", "other")}
    (tmp_path / "shipped").mkdir()
    for name, file in shipped.items():
        file.write_text(MINIMAL.replace("base", f"{name}-base"))
    monkeypatch.setattr("minisft.config_io.shipped_recipes", lambda: shipped)
    for argv, name in (([], "demo"), (["demo"], "demo"), (["other"], "other"), (["--optim.lr", "1"], "demo")):
        config = load(argv)
        assert (config.model.path, config.run.dir) == (f"{name}-base", f"runs/{name}")
    recipe(MINIMAL, "other")                                    # a file comes first
    assert load(["other"]).model.path == "base"
    assert complaints("mien") == [
        "command line: 'mien' is neither a file nor a shipped recipe; "
        "give a TOML file or a shipped recipe: demo, other"]
    shipped["demo"].write_text("[model]\npth = 1\n")
    assert complaints()[0].startswith("shipped recipe demo: model.pth: unknown key (did you mean model.path?)")


def test_a_model_or_data_without_a_recipe_start_from_plain_defaults(recipe, monkeypatch):
    """Never from the demo's learning rate, template or number of steps."""
    options = ["--model.path", "base", "--data.train", "a.jsonl"]
    plain = load(options)
    assert plain == replace(load([recipe()]), run=replace(plain.run, dir="runs/run"))
    assert_round_trip(plain)
    assert complaints("--data.train", "a.jsonl") == [
        "command line: model.path: no base model; name its folder, or set model.init to random and model.config"]
    started = []
    for name in ("runs.lifecycle", "demo.demo_run"):
        monkeypatch.setattr(f"minisft.{name}.main", lambda argv, name=name: started.append((name, argv)))
    for argv in (options, [], ["--optim.lr", "1"], ["demo", "--data.eval", ""], ["mine.toml"], ["--data.train=a"]):
        train_command.main(argv)
    assert started == [
        ("runs.lifecycle", options), ("demo.demo_run", []), ("demo.demo_run", ["--optim.lr", "1"]),
        ("demo.demo_run", ["--data.eval", ""]), ("runs.lifecycle", ["mine.toml"]),
        ("runs.lifecycle", ["--data.train=a"])]


def test_the_demo_is_shipped():
    assert "demo" in config_io.shipped_recipes()


# The saved configuration

def assert_round_trip(config: Config) -> None:
    Path("saved.toml").write_text(to_toml(config), encoding="utf-8")
    assert load(["saved.toml"]) == config


def test_to_toml_states_every_key_with_its_doc_and_loads_back(recipe):
    config = load([recipe(), "--data.train", "a.json,b/a.json", "--optim.betas", "0.1,0.2", "--train.max_steps", "3"])
    assert_round_trip(config)
    assert_round_trip(load([recipe()]))
    table = tomllib.loads(to_toml(config))
    for section in fields(Config):
        assert list(table[section.name]) == [spec.name for spec in fields(section.type)]
        assert all(f"# {spec.metadata['doc']}" in to_toml(config) for spec in fields(section.type))
    assert table["optim"]["lr"] == 2e-5
    assert table["run"]["dir"] == "runs/mine"


def test_an_override_of_a_saved_configuration_reaches_what_was_inherited(recipe):
    text = '[model]\npath = "m"\n[data]\ntrain = ["a", {path = "b", template = "alpaca"}]\ntemplate = "llama3"\n'
    Path("saved.toml").write_text(to_toml(load([recipe(text)])))
    config = load(["saved.toml", "--data.template", "chatml", "--model.path", "n"])
    assert [source.template for source in config.data.train] == ["chatml", "alpaca"]
    assert config.model.tokenizer == "n"
    assert config.run.dir == "runs/mine"


printable = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1)
finite = st.floats(0, 1e18)


@settings(database=None)
@given(path=printable, files=st.lists(st.tuples(printable, st.floats(1e-9, 1e4), st.dictionaries(printable, printable)),
                                      min_size=1, max_size=3), lr=finite,
       steps=st.none() | st.integers(1, 2**62), shuffle=st.booleans(), columns=st.dictionaries(printable, printable))
def test_any_configuration_survives_toml(tmp_path_factory, path, files, lr, steps, shuffle, columns):
    sources = tuple(Source(file, weight=weight, format="text", name=f"n{i}", fields=tuple((own or columns).items()))
                    for i, (file, weight, own) in enumerate(files))
    default = Config()
    config = replace(
        default, model=replace(default.model, path=path, init="pretrained", tokenizer=path),
        run=RunConfig("r"), data=replace(
            default.data, train=sources, shuffle=shuffle, cache="c", fields=tuple(columns.items())),
        optim=replace(default.optim, lr=lr), train=replace(default.train, max_steps=steps))
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load([str(file)]) == config


def test_a_byte_order_mark_and_windows_line_ends_are_fine(recipe):
    Path("dos.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load(["dos.toml"]).model.path == "base"


def test_configurations_are_frozen(recipe):
    with pytest.raises(FrozenInstanceError):
        load([recipe()]).optim.lr = 1.0


# Mistakes

def test_all_problems_are_reported_at_once_with_their_places(recipe):
    name = recipe('lr = 1\n[optm]\n[data]\ntrian = "a"\ntrain = "a"\nseq_len = 1\n[optim]\nbetas = [0.9, 1]\n')
    assert complaints(name, "--model.path", "m", "--optim.lr", "fast", "--data.shuffle") == [
        "mine.toml: lr: unknown key outside a section (did you mean optim.lr?)",
        "mine.toml: optm: unknown section (did you mean optim?); "
        "sections are model, data, batch, train, optim, lora, checkpoint, parallel, eval, run",
        "mine.toml: data.trian: unknown key (did you mean data.train?); --help lists them all",
        "command line: --data.shuffle: the value is missing; expected true|false",
        "mine.toml: data.seq_len: expected int >= 2 and <= 16777216, got 1",
        "mine.toml: optim.betas: expected 2 floats >= 0 and < 1, got [0.9, 1]",
        "command line: --optim.lr: expected float >= 0, got 'fast'",
    ]


@pytest.mark.parametrize(("text", "expected"), [
    ("[train]\nepochs = 1.0", "train.epochs: expected int >= 1 and <= 1000000000, got 1.0"),
    ("[train]\nepochs = true", "train.epochs: expected int >= 1 and <= 1000000000, got True"),
    ("[train]\nmax_steps = 0", "train.max_steps: expected int >= 1 or none, got 0"),
    ("[train]\nepochs = 99999999999999999999", "train.epochs: expected int >= 1 and <= 1000000000, got "
     "99999999999999999999"),
    ("[optim]\nlr = true", "optim.lr: expected float >= 0, got True"),
    ("[optim]\nlr = nan", "optim.lr: expected float >= 0, got nan"),
    ("[optim]\nclip_norm = inf", "optim.clip_norm: expected float >= 0, got inf"),
    ("[optim]\neps = 0.0", "optim.eps: expected float >= 1e-30, got 0.0"),
    ("[optim]\nlr = '1e-5'", "optim.lr: expected float >= 0, got '1e-5'"),
    ("[optim]\nbetas = 0.9", "optim.betas: expected 2 floats >= 0 and < 1, got 0.9"),
    ("[optim]\nbetas = [0.9]", "optim.betas: expected 2 floats >= 0 and < 1, got [0.9]"),
    ("[optim]\nschedule = 'cosin'",
     "optim.schedule: expected cosine|linear|constant|wsd, got 'cosin' (did you mean cosine?)"),
    ("[optim]\nmin_lr_ratio = 2", "optim.min_lr_ratio: expected float >= 0 and <= 1, got 2"),
    ("[parallel]\nreplicate = -1", "parallel.replicate: expected int >= 0, got -1"),
    ("[run]\ndir = 3", "run.dir: expected str, got 3"),
    ('[run]\ndir = "a\\u0000b"', "run.dir: expected str, got 'a\\x00b'"),
    ("[run]\ndir.x = 3", "run.dir: expected str, got {'x': 3}"),
    ("[run]\nshuffle = 1", "run.shuffle: unknown key (did you mean data.shuffle?); --help lists them all"),
    ("[run]\nqqq = 1", "run.qqq: unknown key; --help lists them all"),
    ("[[optim]]\nlr = 1.0", "optim: expected a section [optim], got [{'lr': 1.0}]"),
    ("[batch]\npacks = 2\nmicro_packs = 4",
     "batch.micro_packs: 4 packs per forward pass, but batch.packs is only 2 per step"),
    ("[batch]\nmicro_packs = 64", "batch.micro_packs: 64 packs per forward pass, but batch.packs is only 32 per step"),
    ("[batch]\npacks = 2097152\nmicro_packs = 1048576", "batch.micro_packs: 1048576 packs of 2,048 tokens per forward "
     "pass, which takes less than 2,147,483,648"),
    ("[eval]\nevery = 5", "eval.every: evaluation every 5 steps, but neither data.eval nor "
     "data.general names a file"),
    ("[eval]\nforgetting_bound = 0.3",
     "eval.forgetting_bound: a bound of 0.3 nats on forgetting, but data.general names no file to measure "
     "it on"),
    ("[data]\ngeneral = [{path = 'g', name = 'n'}]\neval = [{path = 'e', name = 'n'}]",
     "data.general: several sources are named n; give each its own name"),
    *((f"[{section}]\n{key} = {value}",
       f"{section}.{key}: {value} does nothing unless {needs}; leave it out, or say {default}")
      for section, key, value, needs, default in (
          ("data", "replay_ratio", 0.2, "data.replay names a file", 0.05),
          ("data", "max_bad", 0, "data.skip_bad is true", 100),
          ("optim", "decay_fraction", 0.5, "optim.schedule is wsd", 0.1),
          ("eval", "max_tokens", 9, "data.eval or data.general names a file", 0),
          ("eval", "patience", 2, "eval.stop_on names a held-out set", 3))),
    ("[optim]\nschedule = 'constant'\nmin_lr_ratio = 0.1",
     "optim.min_lr_ratio: 0.1 does nothing unless optim.schedule lowers the rate; leave it out, or say 0.0"),
    ("[train]\nfp8_scale = 'row'",
     "train.fp8_scale: row does nothing unless train.precision is fp8; leave it out, or say tensor"),
    ("[data]\nreplay = 'r'\nreplay_ratio = 1", "data.replay_ratio: expected float > 0 and < 1, got 1"),
    ("[data]\neval_fraction = 1.0", "data.eval_fraction: expected float >= 0 and < 1, got 1.0"),
    ("[data]\nreplay = ['']", "data.replay: a path is empty"),
    ("[data]\nreplay = [{path = 'r', name = 'n'}, {path = 's', name = 'n'}]",
     "data.replay: several sources are named n; give each its own name"),
    ("[data]\neval = {path = 'e', name = 'heldout-a'}\neval_fraction = 0.1",
     "data.eval: several sources are named heldout-a; give each its own name"),
    ("[data]\ndedup = 'nearly'", "data.dedup: expected none|exact|near, got 'nearly' (did you mean near?)"),
    ("[data]\ndedup = 1", "data.dedup: expected none|exact|near, got 1"),
    ("[data]\neval = 3", "data.eval[0]: expected a path or a table, got 3"),
    ("[data]\neval = ['']", "data.eval: a path is empty"),
    ("[[data.eval]]\nweight = 1", "data.eval[0]: path is missing"),
    ("[[data.eval]]\npath = 'a'\nweight = 0", "data.eval[0].weight: expected float > 0 and <= 10000, got 0"),
    ("[[data.eval]]\npath = 'a'\nweight = 1e18",
     "data.eval[0].weight: expected float > 0 and <= 10000, got 1e+18"),
    ("[data]\ntrain = [{path = 'a', \"\\u001b[31m\" = 1}]",
     "data.train[0].\\x1b[31m: unknown key; a source has path, format, fields, template, weight, name"),
    ("learning_rate = 1", "learning_rate: unknown key outside a section (here: optim.lr)"),
    ("[optim]\nlearning_rate = 1", "optim.learning_rate: unknown key (here: optim.lr); --help lists them all"),
    ("[\"\\u001b]0;x\"]\na = 1", "\\x1b]0;x: unknown section; sections are model, data, batch, train, optim, lora, "
     "checkpoint, parallel, eval, run"),
    ("optim = \"" + "x" * 200 + "\"", "optim: expected a section [optim], got '" + "x" * 78 + "…"),
    ("[[data.eval]]\npath = 'a'\nformt = ''",
     "data.eval[0].formt: unknown key (did you mean format?); a source has path, format, fields, template, weight, "
     "name"),
    ("[data]\neval = [{path = 'a', name = 'n'}, {path = 'b', name = 'n'}]",
     "data.eval: several sources are named n; give each its own name"),
])
def test_one_mistake_in_a_recipe_is_one_line(recipe, text, expected):
    assert complaints(recipe(text), "--model.path", "m", "--data.train", "a") == [f"mine.toml: {expected}"]


THEIRS = """
    learning_rate max_length max_seq_length per_device_train_batch_size gradient_accumulation_steps packing
    num_train_epochs warmup_ratio lr_scheduler_type max_grad_norm adam_beta1 adam_epsilon bf16 fp16
    gradient_checkpointing output_dir save_steps save_total_limit eval_strategy eval_steps logging_steps
    report_to assistant_only_loss completion_only_loss eos_token pad_token chat_template_path model_name_or_path
    dataset_name use_peft lora_r lora_alpha lora_dropout lora_target_modules use_liger_kernel
    attn_implementation padding_free push_to_hub resume_from_checkpoint deepspeed fsdp base_model datasets
    sequence_len sample_packing val_set_size micro_batch_size num_epochs optimizer lr_scheduler adapter
    load_in_4bit load_in_8bit lora_target_linear train_on_inputs flash_attention special_tokens evals_per_epoch
    saves_per_epoch dataset_prepared_path pad_to_sequence_len group_by_length roles_to_train cosine_min_lr_ratio
    cutoff_len dataset finetuning_type lora_rank lora_target quantization_bit neat_packing val_size
    overwrite_cache preprocessing_num_workers mask_history flash_attn overwrite_output_dir ddp_timeout
    enable_liger_kernel use_dora
"""  # of TRL's SFTConfig, axolotl's and LLaMA-Factory's recipes


@pytest.mark.parametrize("name", THEIRS.split())
def test_the_names_of_other_trainers_are_answered_in_a_recipe_and_on_the_command_line(recipe, name):
    own = ("--model.path", "m", "--data.train", "a")
    in_recipe, = complaints(recipe(f"{name} = 1"), *own)
    assert in_recipe.startswith(f"mine.toml: {name}: unknown key outside a section (here: ")
    on_line, = complaints(recipe(""), *own, f"--{name}", "1")
    assert on_line.startswith(f"command line: --{name}: unknown option (here: ")


def test_what_is_meant_exists():
    """An answer that looks like a key is one, and no name of ours has another meaning elsewhere."""
    assert {word for answer in config_io.ELSEWHERE.values() if "." in (word := answer.split()[0].strip(","))} <= \
        set(config_io.KEYS)
    assert not {name for key in config_io.KEYS for name in (key, key.partition(".")[2])} & set(config_io.ELSEWHERE)


def test_yaml_is_answered_with_recipes(recipe):
    problem, = complaints(recipe("base_model: x\n", "axolotl.yaml"))
    assert problem.startswith("axolotl.yaml: not a TOML file: ")
    assert problem.endswith("; YAML is not read, and `minisft recipes` lists recipes to begin with")


@pytest.mark.parametrize(("argv", "expected"), [
    ("--lr 1", "--lr: unknown option (did you mean --optim.lr?); --help lists them all"),
    ("--epoch=1", "--epoch: unknown option (did you mean --train.epochs?); --help lists them all"),
    ("--train.lr 1", "--train.lr: unknown option (did you mean --optim.lr?); --help lists them all"),
    ("--data.seq-len 9", "--data.seq-len: unknown option (did you mean --data.seq_len?); --help lists them all"),
    ("--learning_rate 1", "--learning_rate: unknown option (here: --optim.lr); --help lists them all"),
    ("--max-length 1", "--max-length: unknown option (here: --data.seq_len); --help lists them all"),
    ("--train.gradient_accumulation_steps 1", "--train.gradient_accumulation_steps: unknown option (here: "
     "--batch.packs, over all ranks (accumulation is derived)); --help lists them all"),
    ("--per_device_train_batch_size 1", "--per_device_train_batch_size: unknown option (here: --batch.micro_packs, in "
     "packs of data.seq_len tokens); --help lists them all"),
    ("--packing true", "--packing: unknown option (here: documents are always packed, and never see each other); "
     "--help lists them all"),
    ("--num_train_epochs 1", "--num_train_epochs: unknown option (here: --train.epochs); --help lists them all"),
    ("--warmup_ratio 1", "--warmup_ratio: unknown option (here: --optim.warmup_steps, in steps); --help lists them "
     "all"),
    ("--val_set_size 0.1", "--val_set_size: unknown option (here: --data.eval_fraction, a share from 0 to 1); --help "
     "lists them all"),
    ("--lora_r=8", "--lora_r: unknown option (here: --lora.rank); --help lists them all"),
    ("--output-dir x", "--output-dir: unknown option (here: --run.dir); --help lists them all"),
    ("--\x1b[31mx 1", "--\\x1b[31mx: unknown option; --help lists them all"),
    ("--data.template \x1b[31m", "--data.template: expected str, got '\\x1b[31m'"),
    ("--data.seq_len 16777217", "--data.seq_len: expected int >= 2 and <= 16777216, got 16777217"),
    ("--parallel.timeout 1e10", "--parallel.timeout: expected float > 0 and <= 10000000, got 10000000000.0"),
    ("--lora.rank 65537", "--lora.rank: expected int >= 0 and <= 65536, got 65537"),
    ("-x 1", "-x: unknown option; --help lists them all"),
    ("--", "--: unknown option; --help lists them all"),
    ("--optim.lr", "--optim.lr: the value is missing; expected float >= 0"),
    ("--optim.lr --train.seed 1", "--optim.lr: the value is missing; expected float >= 0"),
    ("--optim.lr=", "--optim.lr: expected float >= 0, got ''"),
    ("--optim.lr -1", "--optim.lr: expected float >= 0, got -1.0"),
    ("--optim.lr nan", "--optim.lr: expected float >= 0, got nan"),
    ("--train.epochs 1e3", "--train.epochs: expected int >= 1 and <= 1000000000, got '1e3'"),
    ("--train.epochs none", "--train.epochs: expected int >= 1 and <= 1000000000, got 'none'"),
    ("--data.shuffle yes", "--data.shuffle: expected true|false, got 'yes'"),
    ("--data.shuffle 1", "--data.shuffle: expected true|false, got '1'"),
    ("--optim.betas 0.9,x", "--optim.betas: expected 2 floats >= 0 and < 1, got [0.9, 'x']"),
    ("--train.seed 1 --train.seed 1", "--train.seed: given twice"),
    ("--data.train a,,b", "--data.train: a path is empty"),
    ("--data.train=", "--data.train: no training data; name at least one file"),
    ("--model.init random", "--model.init: model.config: model.init is random, "
                            "which needs a config.json or the name of a preset"),
])
def test_one_mistake_on_the_command_line_is_one_line(recipe, argv, expected):
    assert complaints(recipe(), *argv.split(" ")) == [f"command line: {expected}"]


def test_the_recipe_comes_first_and_alone(recipe):
    only_one = "; give one recipe, before the options"
    assert complaints(recipe(), "other") == [f"command line: unexpected 'other'{only_one}"]
    assert complaints(recipe(), "--optim.lr", "1", "other") == [f"command line: unexpected 'other'{only_one}"]
    assert f"command line: unexpected 'mine.toml'{only_one}" in complaints("--optim.lr", "1", recipe())


def test_a_base_model_is_needed_and_data(recipe):
    assert complaints(recipe("")) == [
        "mine.toml: data.train: no training data; name at least one file",
        "mine.toml: model.path: no base model; name its folder, or set model.init to random and model.config"]
    argv = [recipe("[data]\ntrain = 'a'"), "--model.init", "pretrained"]
    assert complaints(*argv) == ["command line: --model.init: model.path: no base model; "
                                 "name its folder, or set model.init to random and model.config"]
    config = load([*argv[:1], "--model.init", "random", "--model.config", "c.json"])
    assert (config.model.init, config.model.path, config.model.tokenizer) == ("random", "", "")


def test_a_mistake_in_the_recipe_stays_one_when_overridden(recipe):
    assert complaints(recipe(MINIMAL + "[optim]\nlr = 'x'"), "--optim.lr", "1") == [
        "mine.toml: optim.lr: expected float >= 0, got 'x'"]


def test_unreadable_recipes(recipe):
    assert complaints(recipe("[data]\ntrain = a.json\n"), "--data.seq_len", "1") == [
        "mine.toml: not a TOML file: Invalid value (at line 2, column 9)",
        "command line: --data.seq_len: expected int >= 2 and <= 16777216, got 1"]
    assert complaints(recipe("[data]\nshuffle = true\nshuffle = true"))[0].startswith(
        "mine.toml: not a TOML file: Cannot overwrite a value")
    Path("latin.toml").write_bytes(b"# \xff\n")
    assert complaints("latin.toml")[0].startswith("latin.toml: not a TOML file: 'utf-8' codec can't decode byte 0xff")
    assert complaints(recipe("a = " + "[" * 3000 + "]" * 3000))[0].startswith(
        "mine.toml: not a TOML file: maximum recursion depth exceeded")
    assert complaints(recipe("#" * 2**24 + "\n"))[0] == "mine.toml: not a TOML file: it has more than 16,777,216 bytes"
    Path("folder").mkdir()
    assert complaints("folder")[0].startswith("command line: 'folder' is neither a file nor a shipped recipe")
    assert complaints("")[0].startswith("command line: '' is neither a file nor a shipped recipe")


def test_nothing_is_executed(recipe):
    name = recipe(MINIMAL + "[run]\ndir = \"__import__('os').mkdir('owned')\"\n")
    assert load([name, "--data.template", "{open('owned','w')}"]).run.dir == "__import__('os').mkdir('owned')"
    assert not Path("owned").exists()


# Help

@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["nowhere", "--optim.lr", "x", "--help"]])
def test_help_wins_over_everything(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        load(argv)
    assert caught.value.code == 0
    assert capsys.readouterr().out == help_text() + "\n"


def test_help_tells_each_key_with_type_default_and_doc(monkeypatch):
    monkeypatch.setattr(config_io, "shipped_recipes", lambda: {"demo": None, "llama": None})
    text = help_text()
    assert "Shipped recipes: demo, llama" in text
    assert "Relative paths, in a recipe too, start at the current directory." in text
    for section in fields(Config):
        for spec in fields(section.type):
            line = next(line for line in text.splitlines() if line.startswith(f"  --{section.name}.{spec.name} = "))
            assert spec.metadata["doc"] in line
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "--optim.lr = 2e-05 peak learning rate [float >= 0]" in lines
    assert "--train.max_steps = none stop after this many steps [int >= 1 or none]" in lines
    assert "--optim.betas = 0.9, 0.95 decay of the two moments [2 floats >= 0 and < 1]" in lines


def test_only_the_standard_library_is_needed():
    code = "import sys, minisft.config_io; print([m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
