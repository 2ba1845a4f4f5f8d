"""The store: what is written is what was rendered, once; and neither a kill nor bad input leaves half of it behind.

The oracle for tokens and masks is the renderer applied to each conversation by itself.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from functools import reduce
from operator import and_, or_
from pathlib import Path

import numpy as np
import pytest
from oracles.tiny_llama import write_tiny_llama
from small_data import plain_documents, store_of

from minisft.config import DataConfig
from minisft.data import store as module
from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation, Turn
from minisft.data.dataset import Dataset
from minisft.data.store import near_duplicate_hash
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.formats.parse import read

CONVERSATIONS = Path(__file__).parent / "oracles" / "conversations.jsonl"
TEMPLATES = load_templates()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def renderer(folder):
    return Renderer(TEMPLATES["llama3"], Tokenizer(folder))


@pytest.fixture
def opened(tmp_path, renderer):
    """Opens a file, or lines to be written to one, in a cache of the test's own."""
    def open_(content=CONVERSATIONS, **settings):
        path = content
        if not isinstance(content, Path):
            path = tmp_path / "data.jsonl"
            path.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
        return store_of(path, **{"renderer": renderer, "cache": tmp_path / "cache", **settings})
    return open_


def qa(question="Hi", answer="Hello!"):
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def folders(tmp_path):
    """The folders in the cache, finished or not."""
    return sorted(p.name for p in (tmp_path / "cache").glob("*/"))


# What is stored

def test_documents_come_back_as_rendered(opened, renderer, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 5)  # several batches, the last one short
    store = opened()
    conversations = list(read(CONVERSATIONS))
    assert len(store) == len(conversations) == 32
    dataset = Dataset([store], DataConfig(seq_len=10_000))
    for i, conversation in enumerate(conversations):
        [(ids, trained)] = plain_documents(renderer, [conversation])
        found_ids, found_trained = dataset.document(i)
        assert (found_ids.tolist(), found_trained.tolist()) == (ids, [int(t) for t in trained])
        assert (dataset.lengths[i], dataset.num_loss_tokens[i]) == (len(ids), sum(trained))
        assert dataset.origin(i) == (str(CONVERSATIONS), conversation.line)
    report = store.report
    assert (report.read, report.kept, report.turns) == (32, 32, sum(len(c.turns) for c in conversations))
    assert (report.tokens, report.target_tokens) == (dataset.lengths.sum(), dataset.num_loss_tokens.sum())
    assert report.largest_id == max(dataset.document(i)[0].max() for i in range(32))


def weighted(*weights, record=1):
    """A conversation with an answer of each weight."""
    talk = [message for i, weight in enumerate(weights) for message in (
        {"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "Yes. " * (1 + i), "weight": weight})]
    return json.dumps({"messages": talk, "weight": record})


WEIGHTED = [weighted(0.3, 1, 2.5), weighted(1, 0), weighted(0.5, 1, record=2), weighted(0.1), weighted(0.1, record=0.3)]


def test_weights_come_back_exactly_and_cost_a_byte_a_token(opened, renderer, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "BATCH", 2)
    store = opened(WEIGHTED)
    expected = plain_documents(renderer, list(read(tmp_path / "data.jsonl")))
    assert len({weight for _, weights in expected for weight in weights}) == 7
    for i, (ids, weights) in enumerate(expected):
        found_ids, found = store.document(i)
        assert (found_ids.tolist(), found.tolist()) == (ids, weights)
        assert found.dtype == (np.uint8 if i == 1 else np.float64)
        assert store.num_loss_tokens[i] == sum(weight > 0 for weight in weights)
        assert store.loss_weights[i] == pytest.approx(sum(weights), rel=1e-15)
        assert store.weighted_tokens[i] == sum(weight not in (0, 1) for weight in weights)
    assert (store.folder / "trained.bin").stat().st_size == store.report.tokens
    assert len(np.load(store.folder / "weights.npy")) == 3 + 0 + 2 + 1 + 1
    plain = opened([weighted(1, 0)], name="plain")
    assert not (plain.folder / "weights.npy").exists()
    assert plain.loss_weights is plain.num_loss_tokens
    both = Dataset([plain, store], DataConfig(seq_len=1000))
    assert both.target_weight == pytest.approx(sum(sum(w) for _, w in (expected[1], *expected)), rel=1e-15)
    assert Dataset([plain], DataConfig(seq_len=1000)).target_weight is None


def test_weights_of_truncated_documents_are_those_of_the_tokens_that_are_left(opened, renderer, tmp_path):
    expected = plain_documents(renderer, list(read(opened(WEIGHTED).report.path)))
    first = min(next(i for i, weight in enumerate(weights, 1) if weight) for _, weights in expected)
    for seq_len in range(first, max(len(ids) for ids, _ in expected), 3):
        dataset = Dataset([opened(WEIGHTED)], DataConfig(seq_len=seq_len, overlong="truncate"))
        kept = [weights[:seq_len] for _, weights in expected if any(weights[:seq_len])]
        assert [dataset.document(i)[1].tolist() for i in range(len(dataset))] == kept
        assert dataset.loss_weights.tolist() == pytest.approx(list(map(sum, kept)), rel=1e-15)
        assert dataset.reports[0].weighted_tokens == sum(w not in (0, 1) for weights in kept for w in weights)


def test_documents_of_other_weights_are_no_exact_duplicates(opened):
    store = opened([weighted(0.5), weighted(1), weighted(2), weighted(1, record=0.5), weighted(0.5, record=2)])
    dataset = Dataset([store, opened([weighted(1)], name="other")], DataConfig(seq_len=1000, dedup="exact"))
    assert [dataset.origin(i)[1] for i in range(len(dataset))] == [1, 2, 3]


@pytest.mark.parametrize("file", ["weights.npy", "trained.bin"])
def test_damaged_weights_are_found(opened, file):
    store = opened(WEIGHTED)
    content = bytearray((store.folder / file).read_bytes())
    content[-16 if file == "weights.npy" else content.index(2)] ^= 3
    (store.folder / file).write_bytes(content)
    with pytest.raises(module.DamagedError, match="is not as it was written"):
        module.Store(store.folder)
    assert opened(WEIGHTED).document(0)[1].max() == 2.5


def test_several_stores_are_numbered_through(opened, tmp_path):
    first, second = opened(), opened([qa("a" * 50), qa()], name="other")
    dataset = Dataset([first, second], DataConfig(seq_len=10_000))
    assert len(dataset) == 34
    assert [dataset.origin(i)[1] for i in (0, 31, 32, 33)] == [1, 32, 1, 2]
    assert dataset.origin(33)[0] == str(tmp_path / "data.jsonl")
    assert dataset.document(33)[0].tolist() == second.tokens[second.offsets[1]:].tolist()


def test_what_is_left_out_is_counted_with_its_first_place(opened, tmp_path):
    untrained = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}
    store = opened([qa(), qa(answer=" "), json.dumps(untrained), qa(question=""), qa(answer=""), qa()])
    file = tmp_path / "data.jsonl"
    assert (store.report.read, store.report.kept, len(store)) == (6, 2, 2)
    assert store.report.skipped == {"no answer": 2, "nothing trained": 1, "blank turn": 1}
    assert store.report.examples["no answer"].startswith(f"{file}:2: ")
    assert store.report.examples["nothing trained"] == f"{file}:3"
    assert store.lines.tolist() == [1, 6]


# Found again

def test_the_second_opening_does_not_tokenise(opened, monkeypatch):
    def again(*args):
        yield pytest.fail("the file was read again")

    first = opened()
    second = opened(read=again)
    assert np.array_equal(first.tokens, second.tokens)
    assert first.report == second.report


def test_everything_that_tokens_depend_on_makes_a_store_of_its_own(opened, folder, tmp_path):
    def made(content=None, **settings):
        opened(content or [qa()], **settings)
        return len(folders(tmp_path))

    other_tokenizer = write_tiny_llama(tmp_path / "other") / "tokenizer.json"
    other_tokenizer.write_text(other_tokenizer.read_text() + "\n")
    other_eos = write_tiny_llama(tmp_path / "eos") / "tokenizer_config.json"
    other_eos.write_text('{"eos_token": "<|end_of_text|>"}')
    tokenizer = Tokenizer(folder)
    variants = [
        {}, {"content": [qa("Hi!")]}, {"name": "x"}, {"format": "messages"}, {"skip_bad": True}, {"max_bad": 3},
        {"oasst": "best"}, {"renderer": Renderer(TEMPLATES["llama3.1"], tokenizer)},
        {"renderer": Renderer(TEMPLATES["llama3"], tokenizer, train_on="all")},
        {"renderer": Renderer(TEMPLATES["llama3"], Tokenizer(tmp_path / "other"))},
        {"renderer": Renderer(TEMPLATES["alpaca"], tokenizer)},
        {"renderer": Renderer(TEMPLATES["alpaca"], Tokenizer(tmp_path / "eos"))},
    ]
    assert [made(**variant) for variant in variants] == list(range(1, len(variants) + 1))
    assert [made(**variant) for variant in variants] == [len(variants)] * len(variants)


def test_a_new_version_of_the_renderer_does_not_take_old_stores(opened, tmp_path, monkeypatch):
    opened()
    monkeypatch.setattr("minisft.data.chat.VERSION", -1)
    opened()
    assert len(folders(tmp_path)) == 2


def test_batches_and_threads_leave_no_trace(opened, tmp_path, monkeypatch):
    """The same files, byte for byte, however the work is cut."""
    made = []
    for cut, (batch, characters) in enumerate([(1024, 1 << 22), (1, 1 << 22), (7, 1 << 22), (1024, 500)]):
        monkeypatch.setattr(module, "BATCH", batch)
        monkeypatch.setattr(module, "BATCH_CHARACTERS", characters)
        store = opened(cache=tmp_path / f"cache{cut}")
        made.append({file.name: file.read_bytes() for file in (tmp_path / f"cache{cut}" / store.key).iterdir()})
    assert len(made[0]) == 11
    assert all(other == made[0] for other in made)


def counted_digests(monkeypatch):
    """A list that grows with each file that is hashed."""
    hashed, file_digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or file_digest(file, name))
    return hashed


def aged(monkeypatch, seconds=10):
    """As if all that has been written until now were older."""
    monkeypatch.setattr("minisft.data.store.time.time_ns", lambda now=time.time_ns: now() + seconds * 10**9)


def test_an_unchanged_file_is_hashed_once(opened, tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    file.write_text(qa() + "\n")
    aged(monkeypatch)
    hashed = counted_digests(monkeypatch)
    keys = {opened(file).key for _ in range(3)}
    assert (len(keys), hashed) == (1, [str(file)])
    file.rename(tmp_path / "other.jsonl")
    opened(tmp_path / "other.jsonl")
    (note,) = tmp_path.glob("cache/*.digest")
    note.write_text("{")
    opened(tmp_path / "other.jsonl")
    assert len(hashed) <= 3, "a rename may set ctime; a note that cannot be read is made again"


def test_a_file_that_changed_in_secret_is_noticed(opened, tmp_path, monkeypatch):
    """Same size, same modification time: only ctime tells, and no program can set it."""
    file = tmp_path / "data.jsonl"
    file.write_text(qa(answer="yes") + "\n")
    aged(monkeypatch)
    before, key = file.stat(), opened(file).key
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_text(qa(answer="not") + "\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    changed = opened(file)
    assert changed.key != key
    assert len(folders(tmp_path)) == 2


def test_a_file_changed_just_before_is_not_remembered(opened, tmp_path, monkeypatch):
    """Within one tick of its clock a file could change again and keep its times."""
    hashed = counted_digests(monkeypatch)
    file = tmp_path / "data.jsonl"
    file.write_text(qa() + "\n")
    just_now = file.stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: just_now)  # however slow this machine is
    opened(file)
    opened(file)
    assert hashed == [str(file)] * 2
    assert list(tmp_path.glob("cache/*.digest")) == []


def test_a_file_that_changes_while_it_is_read_is_refused(opened, tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    file.write_text(qa() + "\n")

    def reading(source, *settings):
        yield from read(source.path)
        with file.open("a") as more:
            more.write(qa("more"))
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: changed while it was read; start again when it is"):
        opened(file, read=reading)
    assert folders(tmp_path) == []


def test_an_old_layout_is_not_opened(opened, tmp_path, monkeypatch):
    opened()
    monkeypatch.setattr(module, "LAYOUT", module.LAYOUT + 1)
    opened()
    assert len(folders(tmp_path)) == 2


# What is known of each document, and of all

def test_near_duplicates_have_one_hash(opened):
    same = [qa("Istanbul'un nüfusu?", "On beş milyon."), qa("İSTANBUL’UN  NÜFUSU", "on beş\nMİLYON!"),
            qa("ıstanbulun nüfusu", "_On-beş_ \u201cmilyon\u201d"), qa("Istanbul'un", "nüfusu? On beş milyon.")]
    other = [qa("Istanbul'un nüfusu?", "On altı milyon."), qa("?", "!"), qa("!", "?"), qa("1", "2"), qa("1", "3"),
             qa("Istanbul'un nufusu?", "On beş milyon.")]
    store = opened(same + other)
    assert len(store) == 10
    assert store.near_duplicate_hashes.dtype == np.uint64
    assert len(set(store.near_duplicate_hashes[:4].tolist())) == 1
    assert len(set(store.near_duplicate_hashes.tolist())) == 7
    assert len(set(store.hashes.tolist())) == 10


def of_text(text):
    return near_duplicate_hash(Conversation((Turn("text", text),), "", 0))


def test_near_duplicates_are_one_text_in_any_unicode_form():
    """The oracle is Unicode's definition: canonically equivalent texts are one. 2² is not 22, nor is ş an s; and marks
    without a composed form, such as vowel signs, tell texts apart in every form."""
    texts = ["Şeker çok güzel.", "İstanbul'un ılık ışığı", "ĞÜŞİÖÇ", "Ürünün ölçüsü", "Crème brûlée", "Ångström",
             "여보세요", "日本が", "Tiếng Việt", "résumé İNCE"]
    for text in texts:
        composed, apart = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert composed != apart
        assert of_text(composed) == of_text(apart) == of_text(f"{apart} !") == of_text(apart.lower()), text
    bare = ["Seker cok guzel.", "Istanbul'un ılık ısıgı", "GUSIOC", "Urunun olcusu", "Creme brulee", "Angstrom",
            "Tieng Viet", "resume INCE", "2²", "22"]
    signs = ["दिन", "दान", "दून", "दन", "ठीक", "ठाक", "ดี", "ดู", "กิน", "กัน", "க்", "கி", "שָׁלוֹם", "שלום", "كُتِب", "كَتَب",
             "x̄", "x", "𑀓𑀺", "𑀓𑀼"]
    for text in [*signs, "ΐ", "ǰ", "क़"]:
        assert of_text(text) == of_text(f"«{unicodedata.normalize('NFD', text)}»") == of_text(text.upper()), text
    every = [unicodedata.normalize("NFD", text) for text in texts + bare + signs]
    assert len({of_text(text) for text in every}) == len(every)
    assert of_text("♥\ufe0f İYİ") == of_text("♥" + "İYİ".lower()) != of_text("İYİ")  # lower() leaves i and a dot
    assert len({of_text(text) for text in ("a + b", "a < b", "a > b", "a = b", "👍", "👎", "$5", "€5", "5")}) == 9


def test_tools_count_for_near_duplicates():
    def called(tool="turn_on", **tools):
        turns = Turn("user", "Go"), Turn("call", "{}", tool=tool), Turn("result", '"ok"'), Turn("assistant", "Done.")
        return near_duplicate_hash(Conversation(turns, "", 0, **tools))

    assert called() == called()
    assert len({called(), called("turn_off"), called(tools=({"name": "x"},)), called(tools=({"name": "y"},)),
                called(builtin_tools=("wolfram_alpha",))}) == 5


def test_the_near_duplicate_hash_sees_what_an_independent_folding_sees():
    """Any text: equal hashes exactly where casefolded letters, digits, marks and symbols are equal."""
    def folded(text):
        text = unicodedata.normalize("NFC", text)
        small = unicodedata.normalize("NFC", text.casefold().replace("ı", "i"))
        kept = "".join(c for c in small if c.isalnum() or (unicodedata.category(c) in ("Mn", "Sc", "Sm", "So")
                                                                   and c not in "\u0307\ufe0f"))
        return kept or text

    random = np.random.default_rng(0)
    letters = "aA1_+<$ \u00a0.İiIıĞğéÉß’—中😀\ufe0fΐ\u0306\u0301"
    texts = ["".join(random.choice(list(letters), random.integers(1, 5))) for _ in range(3000)]
    by_fold, by_hash = {}, {}
    for text in texts:
        found = of_text(text)
        by_fold.setdefault(folded(text), set()).add(found)
        by_hash.setdefault(found, set()).add(folded(text))
    assert len(by_fold) > 400
    assert all(len(hashes) == 1 for hashes in by_fold.values())
    assert all(len(folds) == 1 for folds in by_hash.values())


def test_a_near_duplicate_hash_has_64_bits():
    """Each of them is set for some texts and not for others."""
    hashes = [of_text(str(number)) for number in range(64)]
    assert (reduce(or_, hashes), reduce(and_, hashes)) == (2**64 - 1, 0)


@pytest.mark.parametrize("template", ["llama3", "llama3.1", "alpaca", "text"])
def test_words_and_tokens_of_the_contents_are_counted_without_the_template(opened, folder, template):
    """Turkish takes more tokens a word, and the English of the template must not hide that."""
    renderer = Renderer(TEMPLATES[template], Tokenizer(folder))
    store = opened([qa("Kaç yaşındasın sen?", "On  yedi")] * 2 + [qa("Why?", "Because it is so.")], renderer=renderer)
    texts = ["Kaç yaşındasın sen?", "On  yedi"] * 2 + ["Why?", "Because it is so."]
    assert store.report.words == sum(len(text.split()) for text in texts) == 15
    assert store.report.content_tokens == sum(len(renderer.tokenizer.encode(text)) for text in texts)


def test_a_content_that_reads_like_a_control_token_at_both_ends_is_counted_whole(opened, folder):
    renderer = Renderer(TEMPLATES["text"], Tokenizer(folder))
    store = opened([qa("<|eot_id|> or <|eot_id|>", "Yes.")], renderer=renderer)
    assert store.report.words == 4
    assert store.report.content_tokens == sum(
        len(renderer.tokenizer.encode(text)) for text in ("<|eot_id|> or <|eot_id|>", "Yes."))


@pytest.mark.parametrize("template", ["llama3", "llama3.1", "alpaca"])
def test_system_turns_and_tools_do_not_add_the_templates_words(opened, folder, template):
    """Where texts of the template and of the conversation meet in one piece, only the conversation's count."""
    renderer = Renderer(TEMPLATES[template], Tokenizer(folder))
    turns = [turn for conversation in read(CONVERSATIONS) for turn in conversation.turns]
    assert any(turn.role == "system" for turn in turns)
    assert opened(renderer=renderer).report.words == sum(len(turn.content.split()) for turn in turns)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with_tools = json.dumps({**json.loads(qa()), "tools": [tool]})
    if template == "llama3.1":
        report = opened([with_tools], renderer=renderer).report
        assert report.words == len(f"Hi Hello! {json.dumps(tool, indent=4)}".split())


# Interrupted, raced, refused

CHILD = """
import sys, time
from minisft.config import DataConfig
from minisft.data import store
from minisft.data.chat import Renderer
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.config import Source
from minisft.prepare import read_source
folder, file, cache, pause = sys.argv[1:]
store.BATCH = 4
batches = []
class Slow(Renderer):
    def encode(self, documents):
        batches.append(documents)
        time.sleep(float(pause))
        return super().encode(documents)
renderer = Slow(load_templates()["llama3"], Tokenizer(folder))
source = Source(file, format="auto", name="data")
made = store.open_store(source, DataConfig(cache=cache), renderer, read_source, quiet=True)
print(len(batches), len(made), int(made.tokens.astype("int64").sum()))
"""


def child(folder, cache, pause):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(CONVERSATIONS), str(cache), str(pause)],
                            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_store(folder, opened, tmp_path):
    writer = child(folder, tmp_path / "cache", pause=1)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/*.partial/trained.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert [Path(name).suffix for name in folders(tmp_path)] == [".partial"]
    (next(tmp_path.glob("cache/*.partial")) / "left.over").touch()
    assert len(opened()) == 32
    (name,) = folders(tmp_path)
    assert not name.endswith(".partial")
    assert not (tmp_path / "cache" / name / "left.over").exists()


def test_two_processes_at_once_make_one_store(folder, opened, tmp_path):
    both = [child(folder, tmp_path / "cache", pause=0.2) for _ in range(2)]
    said = sorted([int(word) for word in process.communicate(timeout=60)[0].split()] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert len(folders(tmp_path)) == 1
    total = opened().tokens.astype(np.int64).sum()
    assert said == [[0, 32, total], [8, 32, total]], "batches tokenised, documents, sum of the tokens"


@pytest.mark.parametrize(("lines", "settings", "message"), [
    ([qa(), "{"], {}, "data.jsonl:2: bad JSON: "),
    (['{"x": 1}'], {}, "data.jsonl:1: no format matches"),
    ([qa(), "{", "[1]", "}"], {"skip_bad": True, "max_bad": 2}, "data.jsonl: more than data.max_bad = 2 broken"),
])
def test_a_refused_file_leaves_nothing_behind(opened, tmp_path, lines, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        opened(lines, **settings)
    assert folders(tmp_path) == []


def test_an_error_of_any_kind_leaves_nothing_behind(opened, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        opened()
    assert folders(tmp_path) == []
    monkeypatch.undo()
    assert len(opened()) == 32


# Damaged

FILES = ("tokens.bin", "trained.bin", "offsets.npy", "targets.npy", "turns.npy", "largest.npy", "lines.npy",
         "numbers.npy", "hashes.npy", "loose.npy", "report.json")


def contents(store):
    """What a run can see of a store."""
    documents = [(ids.tolist(), trained.tolist()) for ids, trained in map(store.document, range(len(store)))]
    index = (store.offsets, store.num_loss_tokens, store.turns, store.largest, store.lines, store.numbers,
             store.hashes, store.near_duplicate_hashes)
    return store.report, documents, *map(np.ndarray.tolist, index)


def flip(file, place, bit=3):
    """One bit of a file, counted from its end where `place` is negative."""
    whole = bytearray(file.read_bytes())
    whole[place] ^= 1 << bit
    file.write_bytes(whole)


@pytest.fixture
def damaged(opened, tmp_path, capsys):
    """Holds a store against what it was before its files were damaged in some way: found, said, and made again."""
    whole, opened_before = contents(opened()), opened().key
    folder = tmp_path / "cache" / opened_before

    def check(damage, what=".+", **settings):
        damage(folder)
        capsys.readouterr()
        again = opened(**settings)
        said = capsys.readouterr().err
        assert re.fullmatch(rf"{re.escape(str(folder))}: damaged \({what}\); it is made again from its file when it is "
                            r"opened\n", said)
        assert contents(again) == whole
        assert folders(tmp_path) == [folder.name]
        opened(**settings)
        assert capsys.readouterr().err == ""
    return check


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [None, 0, 8])
def test_a_store_that_lost_bytes_is_made_again(damaged, name, size):
    damaged(lambda folder: (folder / name).unlink() if size is None else os.truncate(folder / name, size))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.9, -1])
def test_a_flipped_bit_is_found_at_opening(damaged, name, place):
    """All documents of so small a store are looked at."""
    def damage(folder):
        size = (folder / name).stat().st_size
        flip(folder / name, -1 if place == -1 else int(place * size))
    damaged(damage)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_or_a_bad_block_in_the_place_of_a_file_is_found(damaged, name, monkeypatch):
    def folder_for_file(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
    damaged(folder_for_file)
    if not name.endswith(".bin"):  # those are mapped: a bad block there ends the process
        def bad(folder):
            read = Path.read_text if name == "report.json" else Path.read_bytes
            def reading(path, **options):
                if path == folder / name:
                    monkeypatch.undo()
                    raise OSError(5, "Input/output error", str(path))
                return read(path, **options)
            monkeypatch.setattr(Path, read.__name__, reading)
        damaged(bad, what=r"\[Errno 5\] Input/output error: .+")


def test_a_store_that_may_not_be_read_is_left_alone(opened, tmp_path, monkeypatch):
    opened()
    (file,) = tmp_path.glob("cache/*/report.json")
    read_text = Path.read_text

    def denied(path, **options):
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, **options)
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(PermissionError, match=re.escape(f"Permission denied: '{file}'")):
        opened()
    assert file.exists()


def test_a_file_in_the_place_of_the_folder_is_no_store(damaged):
    def damage(folder):
        shutil.rmtree(folder)
        folder.write_text("")
    damaged(damage)


def test_a_mask_of_ones_is_found(damaged):
    damaged(lambda folder: (folder / "trained.bin").write_bytes(b"\1" * (folder / "trained.bin").stat().st_size),
            what="document 1 of 32 is not as it was written")


@pytest.mark.parametrize(("one", "other"), [("hashes.npy", "loose.npy"), ("targets.npy", "turns.npy"),
                                            ("lines.npy", "largest.npy")])
def test_files_of_one_size_that_changed_places_are_found(damaged, one, other):
    def damage(folder):
        os.rename(folder / one, folder / "aside")
        os.rename(folder / other, folder / one)
        os.rename(folder / "aside", folder / other)
    damaged(damage, what=f"{min(one, other)} is not as it was written")


@pytest.mark.parametrize("name", [*FILES, "*"])
def test_files_of_another_store_are_found(opened, tmp_path, capsys, name):
    """Of one with as many documents of the same lengths; and all of them together."""
    lines = {word: [qa(f"{word} {i}", word) for i in range(5)] for word in ("sea", "sun")}
    opened(lines["sun"], cache=tmp_path / "elsewhere")
    whole, key = contents(opened(lines["sea"])), opened(lines["sea"]).key
    changed = False
    for file in tmp_path.glob(f"elsewhere/*/{name}"):
        place = tmp_path / "cache" / key / file.name
        changed |= place.read_bytes() != file.read_bytes()
        shutil.copy(file, place)
    assert contents(opened(lines["sea"])) == whole
    assert ("damaged" in capsys.readouterr().err) == changed
    assert changed or name in ("offsets.npy", "targets.npy", "turns.npy", "largest.npy", "lines.npy", "numbers.npy",
                               "trained.bin")


def test_whatever_is_read_is_what_was_written(opened, tmp_path, monkeypatch):
    """A document that opening does not look at is found when it is read; the next opening makes the store again."""
    monkeypatch.setattr(module, "SAMPLE", 2)
    whole = contents(opened())
    (file,) = tmp_path.glob("cache/*/trained.bin")
    store = opened()
    start, stop = store.offsets[7:9].tolist()
    flip(file, stop - 1, bit=0)
    store = opened()
    assert store.document(6)[0].tolist() == whole[1][6][0]
    message = (rf"^{re.escape(str(file.parent))}: damaged \(document 8 of 32 is not as it was written\); it is made "
               r"again from its file when it is opened$")
    for settings in ({}, {"overlong": "truncate"}):
        with pytest.raises(OSError, match=message):
            Dataset([store], DataConfig(seq_len=10_000, **settings)).document(7)
    assert folders(tmp_path) == [f"{file.parent.name}.damaged"], "the next start finds none"
    assert store.document(6)[0].tolist() == whole[1][6][0], "who has it open still has it"
    with pytest.raises(OSError, match=message):
        Dataset([store], DataConfig(seq_len=int(stop - start) - 1, overlong="truncate"))
    assert contents(opened()) == whole
    assert folders(tmp_path) == [file.parent.name]


def test_every_document_is_looked_at_on_demand(opened, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SAMPLE", 2)
    whole = contents(opened())
    (file,) = tmp_path.glob("cache/*/tokens.bin")
    flip(file, 4 * int(opened().offsets[20]))
    opened()
    assert capsys.readouterr().err == ""
    assert contents(opened(verify=True)) == whole
    assert "damaged (document 21 of 32 is not as it was written)" in capsys.readouterr().err


def test_a_damaged_store_that_cannot_be_made_again_is_refused(opened, tmp_path, monkeypatch, capsys):
    opened()
    (file,) = tmp_path.glob("cache/*/tokens.bin")
    flip(file, 0)
    def refuse(*args):
        raise OSError(30, "Read-only file system", str(args[0]))
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        opened()
    assert "damaged (document 1 of 32" in capsys.readouterr().err


def test_two_processes_make_a_damaged_store_again_once(folder, opened, tmp_path):
    whole = contents(opened())
    (file,) = tmp_path.glob("cache/*/trained.bin")
    flip(file, 0, bit=0)
    both = [child(folder, tmp_path / "cache", pause=0.2) for _ in range(2)]
    said = sorted([int(word) for word in process.communicate(timeout=60)[0].split()][:2] for process in both)
    assert said == [[0, 32], [8, 32]], "batches tokenised, documents"
    assert contents(opened()) == whole


def test_a_store_is_durable_before_it_has_its_name(opened, tmp_path, monkeypatch):
    """Every file and the folder are synced, then it is renamed, then the rename is synced."""
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name), fsync(descriptor)))
    monkeypatch.setattr(os, "rename", lambda a, b: events.append("rename") or rename(a, b))
    key = opened().key
    assert set(events[:11]) == set(FILES)
    assert events[11:] == [f"{key}.partial", "rename", "cache"]


def test_a_note_of_a_files_digest_is_not_believed_where_it_was_damaged(opened, tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    file.write_text(qa() + "\n")
    aged(monkeypatch)
    sha256 = opened(file).report.sha256
    (note,) = tmp_path.glob("cache/*.digest")
    for place in range(len(note.read_bytes())):
        flip(note, place, bit=0)
        assert opened(file).report.sha256 == sha256
        assert len(folders(tmp_path)) == 1


def test_max_bad_counts_broken_records_of_every_kind(opened, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"\n".join([qa().encode(), b"{", b'{"text": "\xff"}', b"3", qa().encode()]))
    with pytest.raises(UserError, match=re.escape(f"more than data.max_bad = 2 broken records; the first: {file}:2: ")):
        opened(file, skip_bad=True, max_bad=2)
    store = opened(file, skip_bad=True, max_bad=3)
    assert (store.report.read, store.report.kept) == (5, 2)
    assert store.report.skipped == {"bad JSON": 2, "invalid UTF-8": 1}


@pytest.mark.parametrize(("path", "reason"), [("missing.jsonl", "No such file or directory (remedy: name a file that"),
                                              (".", "names no data file; there are none (remedy: name a file")])
def test_no_file(opened, tmp_path, path, reason):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / path}: {reason}")):
        opened(tmp_path / path)
    assert not (tmp_path / "cache").exists()


# Too long, or empty

def answers(*counts):
    """Conversations whose lengths differ by the answers': each digit x is a token of its own."""
    return [qa("Hi", "x y" * count) for count in counts]


def test_too_long_documents_are_dropped_and_counted(opened, tmp_path):
    store = opened(answers(1, 100, 2, 50))
    lengths, targets = np.diff(store.offsets), store.num_loss_tokens
    dataset = Dataset([store], DataConfig(seq_len=int(lengths[3]) - 1))
    assert dataset.lengths.tolist() == [lengths[0], lengths[2]]
    assert [dataset.origin(i)[1] for i in range(2)] == [1, 3]
    report = dataset.reports[0]
    assert report.skipped == {"over length": 2}
    assert report.examples == {"over length": f"{tmp_path / 'data.jsonl'}:2"}
    assert (report.read, report.kept, report.truncated) == (4, 2, 0)
    assert report.lost_target_tokens == targets[1] + targets[3]
    assert store.report.skipped == {}, "the run's counts are not the store's"
    assert len(Dataset([store], DataConfig(seq_len=int(lengths[3])))) == 3, "a document of exactly seq_len tokens fits"


def test_truncation_keeps_the_first_tokens_and_invents_no_stop(opened, renderer):
    store = opened([*answers(1, 100), qa("long " * 100, "z")])
    lengths = np.diff(store.offsets)
    seq_len = int(lengths[0]) + 5
    dataset = Dataset([store], DataConfig(seq_len=seq_len, overlong="truncate"))
    assert dataset.lengths.tolist() == [lengths[0], seq_len]
    ids, trained = dataset.document(1)
    [(whole_ids, whole_trained)] = plain_documents(renderer, [list(read(store.report.path))[1]])
    assert (ids.tolist(), trained.tolist()) == (whole_ids[:seq_len], [int(t) for t in whole_trained[:seq_len]])
    assert ids[-1] not in renderer.stop_ids()
    assert dataset.num_loss_tokens[1] == sum(whole_trained[:seq_len])
    report = dataset.reports[0]
    assert (report.kept, report.truncated) == (2, 1)
    assert report.skipped == {"answer beyond the length": 1}
    assert report.examples["answer beyond the length"].endswith("data.jsonl:3")
    assert report.lost_target_tokens == store.num_loss_tokens.sum() - dataset.num_loss_tokens.sum()
    assert (report.tokens, report.target_tokens) == (dataset.lengths.sum(), dataset.num_loss_tokens.sum())


def test_too_long_documents_may_be_an_error(opened, tmp_path):
    store = opened(answers(1, 100, 50))
    lengths = np.diff(store.offsets)
    message = (f"{tmp_path / 'data.jsonl'}:2: {lengths[1]} tokens, but data.seq_len is 40 (2 conversations are too "
               f'long, the longest has {lengths[1]}); raise data.seq_len, or pass data.overlong = "drop", "truncate" '
               'or "split"')
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Dataset([store], DataConfig(seq_len=40, overlong="error"))
    assert len(Dataset([store], DataConfig(seq_len=int(lengths[1]), overlong="error"))) == 3


def test_an_empty_file_is_a_store_but_no_data_set(opened, tmp_path):
    store = opened([])
    assert (len(store), store.report.read, store.report.kept) == (0, 0, 0)
    file = tmp_path / "data.jsonl"
    message = f"no conversation is left to train on:\n  {file}: 0 read; the file is empty"
    with pytest.raises(UserError, match=re.escape(message)):
        Dataset([store], DataConfig(seq_len=100))
    assert len(Dataset([store, opened()], DataConfig(seq_len=1000))) == 32


def test_a_data_set_without_documents_says_why(opened, tmp_path):
    store = opened([*answers(100), qa(answer="")])
    file = tmp_path / "data.jsonl"
    message = (f"no conversation is left to train on:\n  {file}: 2 read; no answer: 1 (first: {file}:2: ''), "
               f"over length: 1 (first: {file}:1)")
    with pytest.raises(UserError, match=re.escape(message)):
        Dataset([store], DataConfig(seq_len=20))


def test_many_random_documents_survive_the_round_trip(opened, renderer, tmp_path):
    random = np.random.default_rng(0)
    lines = [qa("".join(map(chr, random.integers(32, 0x2FFF, 9))) + "?", "a" * int(random.integers(1, 40)))
             for _ in range(module.BATCH + 100)]
    store = opened(lines)
    conversations = [c for c in read(tmp_path / "data.jsonl") if isinstance(c, Conversation)]
    expected = plain_documents(renderer, conversations)
    assert store.tokens.tolist() == [token for ids, _ in expected for token in ids]
    assert store.codes.tolist() == [int(t) for _, trained in expected for t in trained]
    assert store.offsets.tolist() == [0, *np.cumsum([len(ids) for ids, _ in expected]).tolist()]


def test_exact_duplicates_are_counted_and_left_out_on_demand(opened):
    """Across files too; the first of them stays."""
    first = opened([qa("a"), qa("b"), qa("a"), qa("a", "another answer")])
    second = opened([qa("c"), qa("b"), qa("c")], name="other")
    kept = Dataset([first, second], DataConfig(seq_len=1000))
    assert [report.duplicates for report in kept.reports] == [1, 2]
    assert len(kept) == 7
    deduplicated = Dataset([first, second], DataConfig(seq_len=1000, dedup="exact"))
    assert [deduplicated.origin(i)[1] for i in range(4)] == [1, 2, 4, 1]
    assert len(deduplicated) == 4
    assert [report.skipped["duplicate"] for report in deduplicated.reports] == [1, 2]
    assert all(report.lost_target_tokens == 0 for report in deduplicated.reports)
