"""What an epoch is made of: weights, replay, the held-out split and repetitions, counted over what a run really sees.

The oracle goes through the plan document by document, with the texts that were written into the files.
"""

import json
import random
import re
import shutil
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles.tiny_llama import write_tiny_llama
from small_runs import log, train

from minisft import config_io
from minisft.data.packing import draw_copies
from minisft.errors import UserError
from minisft.prepare import held_out, prepare, replay_weights
from minisft.reports.data_report import describe, figures
from minisft.runs.assemble import Base, Run

WORDS = ["the", "sea", "is", "on", "a", "bir", "dağ", "göl", "ev", "and", "then", "kırmızı", "yeşil", "in", "rain"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def sentence(dice):
    return " ".join(dice.choices(WORDS, k=dice.randint(2, 40)))


@pytest.fixture
def here(tmp_path, monkeypatch, tiny):
    """A current directory with a model, three files and a recipe; no two texts are the same."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "model")
    dice = random.Random(1)
    for name, count in (("a", 200), ("b", 120)):
        rows = [{"prompt": f"{name} {i}: {sentence(dice)}", "completion": sentence(dice)} for i in range(count)]
        write(f"{name}.jsonl", rows)
    write("general.jsonl", [{"text": f"{i}: {sentence(dice)}"} for i in range(90)])
    Path("r.toml").write_text('[model]\npath = "model"\n[data]\ntrain = ["a.jsonl", "b.jsonl"]\ntemplate = "llama3"\n'
                              'seq_len = 600\ncache = "cache"\n[batch]\npacks = 3\n')
    return tmp_path


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepared(*argv):
    return prepare(config_io.load(["r.toml", *argv]), quiet=True)


def epochs(data):
    """For each epoch the (file, line, tokens, trained tokens) of all its documents, as the steps bring them."""
    found = {}
    for step in range(data.plan.total_steps):
        for i in np.concatenate(data.plan.documents(step)).tolist():
            ids, trained = data.train.document(i)
            found.setdefault(data.plan.place(step).epoch, []).append((*data.train.origin(i), len(ids), sum(trained)))
    return list(found.values())


def tokens(documents, *files):
    return sum(length for file, _, length, _ in documents if not files or file in files)


# Weights

@given(st.lists(st.tuples(st.floats(0.01, 4), st.lists(st.integers(1, 500), min_size=1, max_size=40)),
                min_size=1, max_size=4, unique_by=lambda source: source[0]), st.integers(0, 2**32 - 1))
@example([(0.25, [1]), (1.5, [2, 240, 241]), (0.5, [1, 1, 240, 242])], 0)  # two weights of one fraction
@settings(max_examples=150)
def test_a_source_has_its_weight_in_tokens_to_within_one_document(sources, seed):
    lengths = np.concatenate([own for _, own in sources])
    weights = np.concatenate([np.full(len(own), weight) for weight, own in sources])
    times = draw_copies(weights, lengths, np.random.default_rng(seed))
    start = 0
    for weight, own in sources:
        mine, start = times[start : start + len(own)].tolist(), start + len(own)
        assert set(mine) <= {int(weight), int(weight) + 1}, "whole passes come for every document"
        seen = sum(n * length for n, length in zip(mine, own, strict=True))
        assert abs(seen - weight * sum(own)) <= max(own) + 1e-6 * sum(own)


@pytest.mark.parametrize(("share", "count"), [(0.02, 100), (0.1, 100), (0.45, 100), (0.9, 100), (0.003, 80),
                                                (2.3, 10)])
def test_long_documents_come_as_often_as_short_ones(share, count):
    """Each decile of the lengths, and the longest document alone, within what chance allows."""
    lengths = np.sort(np.exp(np.random.default_rng(0).normal(5, 1.2, count)).astype(np.int64))
    random, weights, rounds = np.random.default_rng(1), np.full(count, share), 20_000
    times = np.zeros(count)
    for _ in range(rounds):
        times += draw_copies(weights, lengths, random)
    whole, part = divmod(share, 1)
    error = np.sqrt(part * (1 - part) / rounds)  # of one document's mean; members of a decile rarely come together
    assert abs(times / rounds - whole - part).max() < 5 * error
    for decile in np.array_split(times, 10):
        assert abs(decile.mean() / rounds - share) < 5 * error / np.sqrt(len(decile))


def test_samples_of_different_epochs_share_no_pattern():
    """Even where no two documents are of one length, which fixes their order."""
    random, seen = np.random.default_rng(0), Counter()
    for _ in range(300):
        seen[tuple(draw_copies(np.full(40, 0.5), np.arange(1, 41), random))] += 1
    assert len(seen) > 290


def test_a_million_documents_are_sampled_quickly():
    start = time.process_time()
    lengths = np.random.default_rng(0).integers(10, 8000, 10**6)
    times = draw_copies(np.full(10**6, 0.3), lengths, np.random.default_rng(1))
    print(f"{time.process_time() - start:.2f} s")
    assert times.sum() in (300_000, 299_999, 300_001)
    assert time.process_time() - start < 3


def test_weights_in_a_run_are_drawn_anew_each_epoch_and_the_same_for_the_same_seed(here):
    recipe = Path("r.toml").read_text()
    Path("r.toml").write_text(recipe.replace('["a.jsonl", "b.jsonl"]',
                                             '[{path = "a.jsonl", weight = 0.5}, {path = "b.jsonl", weight = 2.25}]'))
    seen = epochs(prepared())
    assert len(seen) == 3
    whole = {file: tokens(documents, file) for documents in epochs(prepared("--data.train", "a.jsonl,b.jsonl"))
             for file in ("a.jsonl", "b.jsonl")}
    for documents in seen:
        longest = max(length for _, _, length, _ in documents)
        assert abs(tokens(documents, "a.jsonl") - 0.5 * whole["a.jsonl"]) <= longest
        assert abs(tokens(documents, "b.jsonl") - 2.25 * whole["b.jsonl"]) <= longest
        times = Counter((file, line) for file, line, _, _ in documents)
        assert {n for (file, _), n in times.items() if file == "a.jsonl"} == {1}
        assert {n for (file, _), n in times.items() if file == "b.jsonl"} == {2, 3}
    drawn = [{line for file, line, _, _ in documents if file == "a.jsonl"} for documents in seen]
    assert drawn[0] != drawn[1] != drawn[2]
    assert epochs(prepared()) == seen
    assert epochs(prepared("--train.seed", "1")) != seen


# Replay

@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0.01, 100), st.booleans()), min_size=2, max_size=6),
       st.floats(0.001, 0.999))
@settings(max_examples=100)
def test_replay_weights_give_the_ratio_and_keep_the_rest(sources, ratio):
    sources[0], sources[1] = (*sources[0][:2], False), (*sources[1][:2], True)
    counts, given_weights, replayed = map(np.array, zip(*sources, strict=True))
    found = replay_weights(counts, given_weights, replayed, ratio)
    seen = counts * found
    assert seen[replayed].sum() / seen.sum() == pytest.approx(ratio)
    assert (found[~replayed] == given_weights[~replayed]).all()
    factors = found[replayed] / given_weights[replayed]
    assert factors == pytest.approx(factors[0])


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.45, 0.9])  # a part of the general text; from 0.3 on it repeats
def test_replay_has_its_share_of_the_tokens_in_every_epoch(here, ratio):
    data = prepared("--data.replay", "general.jsonl", "--data.replay_ratio", str(ratio))
    plain = epochs(prepared())
    seen = epochs(data)
    assert len(seen) == 3
    for documents, without in zip(seen, plain, strict=True):
        general = [length for file, _, length, _ in documents if file == "general.jsonl"]
        assert abs(sum(general) - ratio / (1 - ratio) * tokens(without)) < max(general)
        rest = Counter(document for document in documents if document[0] != "general.jsonl")
        assert rest == Counter(without), "replay takes nothing from the training data"
        assert all(trained == length - 1 for file, _, length, trained in documents if file == "general.jsonl")
    replayed = [Counter(line for file, line, *_ in documents if file == "general.jsonl") for documents in seen]
    assert replayed[0] != replayed[1] != replayed[2]


def test_plain_text_is_replayed_with_the_first_and_last_token_of_its_template(here):
    data = prepared("--data.replay", "general.jsonl")
    texts = [json.loads(line)["text"] for line in Path("general.jsonl").read_text(encoding="utf-8").splitlines()]
    for i in range(len(data.train)):
        file, line = data.train.origin(i)
        if file == "general.jsonl":
            ids, trained = data.train.document(i)
            assert (ids[0], ids[-1], trained.tolist()) == (309, 310, [0] + [1] * (len(ids) - 1))
            assert data.tokenizer.decode(ids[1:-1].tolist()) == texts[line - 1]


# The held-out split

class Index(list):
    """What `held_out` looks at in a store: (hash, record) of its documents."""

    near_duplicate_hashes = property(lambda self: np.array([h for h, _ in self], dtype=np.uint64))
    records = property(lambda self: 1 + np.unique([record for _, record in self], return_inverse=True)[1].astype(int))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50), st.floats(0, 0.999), st.floats(0, 0.999))
def test_a_larger_fraction_holds_out_the_same_and_more(hashes, one, other):
    stores = [Index(zip(hashes, range(1, len(hashes) + 1), strict=True))]
    [small], [large] = (held_out(stores, fraction, 1) for fraction in sorted((one, other)))
    assert not (small & ~large).any()
    assert small.tolist() == [h < int(min(one, other) * 2.0**64) for h in hashes]
    assert not held_out(stores, 0, 1)[0].any()


documents = st.lists(st.tuples(st.integers(0, 19), st.integers(1, 6)), max_size=12).map(
    lambda found: Index(sorted(((tenth * 2**63 // 10, r) for tenth, r in found), key=lambda one: one[1])))


@settings(max_examples=60)
@given(st.lists(documents, min_size=1, max_size=3), st.sampled_from([0.1, 0.5, 0.9]), st.integers(1, 3))
def test_the_held_out_share_neither_text_nor_record_with_the_rest_and_only_for_that_more_is_held(stores, part, count):
    count = min(count, len(stores))
    chosen = {(i, r) for i, store in enumerate(stores[:count]) for r in {r for _, r in store}
              if next(h for h, record in store if record == r) < part * 2**64}
    while True:  # naive: one record more, as long as one shares a text with those that are chosen
        texts = {h for i, store in enumerate(stores) for h, r in store if (i, r) in chosen}
        more = {(i, r) for i, store in enumerate(stores) for h, r in store if h in texts} - chosen
        if not more:
            break
        chosen.add(more.pop())
    assert [mask.tolist() for mask in held_out(stores, part, count)] == [
        [(i, r) in chosen for _, r in store] for i, store in enumerate(stores)]


def test_no_answer_of_a_held_out_tree_is_trained_and_no_copy_is_replayed(here):
    def message(role, text, replies):
        return {"role": role, "text": text, "replies": replies}

    def tree(name):
        ends = [message("prompter", f"{name} why {i}?", [message("assistant", "So.", [])]) for i in range(3)]
        return {"message_tree_id": name, "prompt": message("prompter", name, [message("assistant", "Yes.", ends)])}

    trees = [tree(f"q{i}") for i in range(40)]
    chats = [{"prompt": f"{i}?", "completion": "Yes."} for i in range(40)]
    Path("trees.json").write_text(json.dumps(trees))  # all on one line
    write("chats.jsonl", chats)
    write("replay.jsonl", [{name: text.upper() + "!" for name, text in chat.items()} for chat in chats])
    options = ["--data.eval_fraction", "0.3", "--data.replay", "replay.jsonl"]
    data = prepared("--data.train", "trees.json,chats.jsonl", *options)
    names = [{re.findall(r"q\d+", data.tokenizer.decode(dataset.document(i)[0].tolist()))[0]
              for i in range(len(dataset)) if dataset.origin(i)[0] == "trees.json"}
             for dataset in (data.train, data.evals["heldout-trees"])]
    assert not names[0] & names[1]
    assert set.union(*names) == {f"q{i}" for i in range(40)}
    assert 4 < len(names[1]) < 20
    trained, held = sides(data)
    assert not trained["replay.jsonl"] & held["chats.jsonl"]
    assert trained["replay.jsonl"] == trained["chats.jsonl"]
    assert "replay.jsonl" not in held
    assert [data.evals[name].reports[0].also_trained for name in data.evals] == [0, 0]
    alone = sides(prepared("--data.train", "chats.jsonl", "--data.eval_fraction", "0.3"))[1]
    assert alone["chats.jsonl"] == held["chats.jsonl"]


def test_a_file_whose_conversations_are_changed_can_be_split(here):
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    write("a.jsonl", [{"messages": [{**turns[0], "content": f"{i}"}, *turns[1:]]} for i in range(50)])
    data = prepared("--data.train", "a.jsonl", "--data.eval_fraction", "0.3")
    assert data.train.reports[0].changed == {"end without an answer cut": 50}
    assert data.evals["heldout-a"].reports[0].changed == {}
    assert "changed, end without an answer cut: 50 (first: a.jsonl:1)" in describe(figures(data))


def sides(data):
    """Lines of each file on the training side, and those held out."""
    trained, held = {}, {}
    for side, datasets in ((trained, [data.train]), (held, data.evals.values())):
        for dataset in datasets:
            for i in range(len(dataset)):
                file, line = dataset.origin(i)
                side.setdefault(file, set()).add(line)
    return trained, held


def test_the_split_is_whole_and_knows_neither_seed_nor_order_nor_other_files(here):
    data = prepared("--data.eval_fraction", "0.2")
    trained, held = sides(data)
    assert list(data.evals) == ["heldout-a", "heldout-b"]
    for file, count in (("a.jsonl", 200), ("b.jsonl", 120)):
        assert trained[file] | held[file] == set(range(1, count + 1))
        assert not trained[file] & held[file]
        assert 0.1 * count < len(held[file]) < 0.3 * count
    assert all(dataset.reports[0].also_trained == 0 for dataset in data.evals.values())

    lines = Path("a.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("a.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    other = prepared("--data.eval_fraction", "0.2", "--data.train", "general.jsonl,b.jsonl,a.jsonl",
                     "--train.seed", "9", "--data.dedup", "near")
    again = sides(other)[1]
    assert {201 - line for line in again["a.jsonl"]} == held["a.jsonl"]
    assert again["b.jsonl"] == held["b.jsonl"]


def test_near_copies_never_lie_on_both_sides(here):
    dice = random.Random(2)
    rows = [{"prompt": f"{i} {sentence(dice)}", "completion": sentence(dice)} for i in range(60)]
    write("a.jsonl", rows)
    write("b.jsonl", [{"prompt": row["prompt"].replace("the", "THE"),
                       "completion": row["completion"].replace(" ", ",  ") + "!"} for row in rows])
    data = prepared("--data.eval_fraction", "0.3")
    trained, held = sides(data)
    assert held["a.jsonl"] == held["b.jsonl"]
    assert trained["a.jsonl"] == trained["b.jsonl"]
    assert len(held["a.jsonl"]) > 5
    assert [r.near_duplicates for r in data.train.reports] == [0, len(trained["b.jsonl"])]
    assert len(sides(prepared("--data.dedup", "near"))[0]) == 1


def test_replay_is_never_held_out_and_copies_in_eval_files_are_counted(here):
    shutil.copy("b.jsonl", "e.jsonl")
    data = prepared("--data.replay", "general.jsonl", "--data.eval_fraction", "0.5", "--data.eval", "e.jsonl")
    trained, _ = sides(data)
    assert trained["general.jsonl"] == set(range(1, 91))
    assert data.evals["e"].reports[0].also_trained == len(trained["b.jsonl"])


# Repetitions

def test_repetitions_are_counted_and_left_out_as_asked(here):
    answers = ["Yes, it is.", "Yes, it is.", "YES it is!", "No.", "yes it is", "no"]
    write("a.jsonl", [{"prompt": "Is it?", "completion": answer} for answer in answers])
    expected = {"none": [1, 2, 3, 4, 5, 6], "exact": [1, 3, 4, 5, 6], "near": [1, 4]}
    for dedup, kept in {**expected, "true": expected["exact"], "false": expected["none"]}.items():
        data = prepared("--data.train", "a.jsonl", "--data.dedup", dedup)
        assert sorted(data.train.origin(i)[1] for i in range(len(data.train))) == kept
        report = data.train.reports[0]
        assert (report.duplicates, report.near_duplicates) == (1, 3)
        assert report.read == report.kept + sum(report.skipped.values())


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_copy_of_what_is_too_long_stays(here, kind, overlong):
    short = "yes " * 5
    texts = [short + "\n---" * 300, short, short.upper(), short + "\n---" * 300]
    write("a.jsonl", [{"text": text} if kind == "text" else {"prompt": "Is it?", "completion": text} for text in texts])
    data = prepared("--data.train", "a.jsonl", "--data.dedup", "near", "--data.seq_len", "100", "--data.overlong",
                    overlong)
    report, drops = data.train.reports[0], overlong == "drop" or (overlong, kind) == ("split", "chat")
    assert {data.train.origin(i)[1] for i in range(len(data.train))} == {2 if drops else 1}
    assert report.skipped == ({"over length": 2, "near duplicate": 1} if drops else
                              {"duplicate": 1, "near duplicate": 2})


# What is refused

@pytest.mark.parametrize("key", ["eval", "general"])
def test_a_weight_of_what_is_only_evaluated_is_refused(here, key):
    for weight, refused in ((0.5, True), (1, False)):
        argv = [f"--data.{key}", f'[{{path = "general.jsonl", weight = {weight}}}]']
        with pytest.raises(UserError) if refused else nullcontext() as caught:
            prepared(*argv)
        if refused:
            assert f"--data.{key}: a weight is of passes in training, and losses are of one pass; leave it out" in str(
                caught.value)

@pytest.mark.parametrize(("argv", "message"), [
    (["--data.eval_fraction", "1e-9"], "data.eval_fraction: 1e-09 of 320 documents holds out none that fits; raise it"),
    (["--data.replay", "long.jsonl"],
     "data.replay: no conversation is left to train on:\n  long.jsonl: 1 read; over length: 1 (first: long.jsonl:1)\n"
     "  remedy for documents over length: raise data.seq_len, write shorter records, or pass --data.overlong truncate"),
    (["--data.train", "long.jsonl", "--data.replay", "general.jsonl"],
     "data.train: no conversation is left to train on:\n  long.jsonl: 1 read; over length: 1 (first: long.jsonl:1)"),
])
def test_a_mixture_that_cannot_be(here, argv, message):
    write("long.jsonl", [{"text": "sea " * 900}])
    with pytest.raises(UserError) as caught:
        prepared(*argv)
    assert message in str(caught.value)


def test_a_first_epoch_without_documents_is_refused(here):
    write("one.jsonl", [{"prompt": "Is it?", "completion": "Yes."}])
    recipe = Path("r.toml").read_text().replace('["a.jsonl", "b.jsonl"]', '{path = "one.jsonl", weight = 0.01}')
    Path("r.toml").write_text(recipe)
    with pytest.raises(UserError, match="no document appears in the first epoch: the weights"):
        prepared("--train.epochs", "500")


# In a run

def test_the_log_has_the_trained_tokens_of_each_source(tiny, here):
    settings = {"data__train": "b.jsonl", "data__replay": "general.jsonl", "data__replay_ratio": 0.2,
                "data__eval_fraction": 0.1, "train__max_steps": 4, "batch__packs": 12, "data__seq_len": 600}
    records = train(tiny, here, **settings)
    data = prepare(config_io.load([f"{here}/run/config.toml"]), quiet=True)
    names = {"b.jsonl": "b", "general.jsonl": "general"}
    assert len(records) == 4
    assert len({record["epoch"] for record in records}) > 1
    for record in records:
        counted = dict.fromkeys(names.values(), 0)
        for i in np.concatenate(data.plan.documents(record["step"] - 1)).tolist():
            counted[names[data.train.origin(i)[0]]] += int(data.train.document(i)[1].sum())
        assert record["sources"] == counted
        assert sum(counted.values()) == record["target_tokens"]
    assert {record["name"] for record in log(here, "eval")} == {"heldout-b"}
    assert data.shares(0) == {"sources": records[0]["sources"]}
    assert prepared("--data.train", "a.jsonl").shares(0) == {}


def test_a_run_is_only_itself_with_the_same_mixture(here):
    def fingerprint(*argv, replay="general.jsonl"):
        data = prepared("--data.replay", replay, *argv)
        return Run(data.config, data, None, Base(data.network, None, {}), None, None).fingerprint

    def changed(*argv, **replay):
        found = fingerprint(*argv, **replay)
        return {key for key in {*found, *first} if found.get(key) != first.get(key)}

    first = fingerprint()
    assert changed("--eval.every", "5", "--data.eval", "b.jsonl") == {"held-out b"}  # which may come and go
    assert changed("--data.replay_ratio", "0.06") == {"data.replay_ratio", "weights"}
    assert changed(replay="") == {"data", "data.replay", "weights"}
    assert "data.eval_fraction" in changed("--data.eval_fraction", "0.01")
    assert "data.dedup" in changed("--data.dedup", "near")
