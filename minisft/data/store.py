"""Tokenised conversations in memory-mapped files, made once and found again by their content.

    <cache>/<key>/tokens.bin    uint32, all documents one after another
                  trained.bin   uint8, 1 where the token is trained
                  offsets.npy   (documents + 1,) int64
                  targets.npy   (documents,) int64: trained tokens of each
                  turns.npy     (documents,) int64: turns of each
                  largest.npy   (documents,) int64: the largest token id of each
                  lines.npy     (documents,) int64: where each came from
                  hashes.npy    (documents,) uint64: of ids and mask, equal for exact duplicates
                  loose.npy     (documents,) uint64: of letters and digits alone, equal for near-exact duplicates
                  report.json   what was read, kept, and left out for which reason; the sizes of the files above, and
                                the digests of those of the index (.npy) and of itself

The key is a hash of everything that the tokens depend on: the file's bytes, how it is read, the tokenizer, the
template, which tokens are trained, the version of the renderer. A folder appears under its name in one rename, when
its bytes are on the disk, so one that exists is complete; of several processes that want it, one makes it and the
others wait. `seq_len` is not part of it: what is too long is decided when a run opens the data (dataset.py).

Disks lose bits. So the index is held against its digests at opening, and each document against its hash whenever it is
read: no run trains on other tokens than were written. At opening some documents are looked at, too, or all of them
(`minisft prepare --verify`). A damaged store is set aside, which is said, and made again from its file.

The file is read and rendered in one thread while the batch before is tokenised; the tokenizer brings its own threads.
Batches are bounded by characters, so that the memory needed does not grow with the file but for 56 bytes a document.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minisft.data.chat import Renderer
from minisft.data.checks import Laws
from minisft.data.conversation import Conversation, Skipped
from minisft.data.digest import content_digest, file_state
from minisft.data.encoding import Documents, Rendered, encode, loose_hash, render
from minisft.data.formats import read
from minisft.data.tokenizer import TokenizerError
from minisft.errors import UserError

LAYOUT = 6  # of these files: raise it when they change, so that old folders are not opened
BATCH = 1024  # conversations that are tokenised together
BATCH_CHARACTERS = 1 << 22  # or fewer, where they are long
SAMPLE = 256  # documents that are looked at when a store is opened
LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # what a disk says of files that it lost
ARRAYS = ("offsets", "targets", "turns", "largest", "lines", "hashes", "loose")
BROKEN = ("bad JSON", "invalid UTF-8")  # reasons that count against max_bad: the record itself, not what it says


@dataclass
class Report:
    """What became of a file. Counts of tokens are of the documents kept."""

    name: str
    path: str
    template: str
    sha256: str = ""  # of the file's bytes
    read: int = 0
    kept: int = 0
    turns: int = 0
    words: int = 0  # of the contents, as white space separates them
    content_tokens: int = 0  # of the contents, without the template's own; per word they tell what a language costs
    tokens: int = 0
    target_tokens: int = 0
    largest_id: int = 0  # to be held against the model's vocabulary
    truncated: int = 0
    duplicates: int = 0  # documents that are exactly another one before them, here or in an earlier source
    lost_target_tokens: int = 0  # trained tokens of documents that were too long
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> conversations left out
    changed: dict[str, int] = field(default_factory=dict)  # what was done to a conversation -> conversations
    examples: dict[str, str] = field(default_factory=dict)  # reason -> where it was first met
    unread: dict[str, int] = field(default_factory=dict)  # field that nothing reads -> records that have it

    def skip(self, reason: str, where: str, count: int = 1) -> None:
        """Count conversations left out, and remember the first."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count
        self.examples.setdefault(reason, where)

    def change(self, note: str, where: str) -> None:
        """Count a conversation that is kept, but not as it was, and remember the first."""
        self.changed[note] = self.changed.get(note, 0) + 1
        self.examples.setdefault(note, where)


class DamagedError(OSError):
    """A store is not as it was written. It has been set aside, so that it is made again when it is next opened."""

    def __init__(self, folder: Path, what: object):
        aside = folder.with_suffix(".damaged")  # those who have it open keep it
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):  # another process was first, or nobody can
                os.rename(folder, aside)
        super().__init__(f"{folder}: damaged ({what}); it is made again from its file when it is opened")


class Store:
    """The documents of one file, opened from its folder. Raises DamagedError.

    The index is looked at whole, and `sample` of the documents; the others are when they are read.
    """

    def __init__(self, folder: Path, sample: int | None = None):
        self.folder, self.key = folder, folder.name
        try:
            saved = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            if saved != _signed(saved["report"], saved["files"], self.key):
                raise ValueError("report.json is not as it was written")
            self.report = Report(**saved["report"])
            for name, expected in saved["files"].items():
                if _described(folder / name) != expected:
                    raise ValueError(f"{name} is not as it was written")
            self.offsets, self.targets, self.turns, self.largest, self.lines, self.hashes, self.loose = (
                np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS)
            if len(self):  # an empty file cannot be mapped; slices of a plain array are ten times as fast as a memmap's
                self.tokens, self.trained = (np.asarray(np.memmap(folder / name, dtype, "r"))
                                             for name, dtype in (("tokens.bin", np.uint32), ("trained.bin", np.uint8)))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno not in LOST:  # "permission denied" is no damage
                raise
            raise DamagedError(folder, error) from None
        for index in np.linspace(0, len(self) - 1, min(len(self), sample or len(self)), dtype=np.int64).tolist():
            self.document(index)

    def __len__(self) -> int:
        return len(self.lines)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (L,) and mask (L,) of a document."""
        start, stop = self.offsets[index : index + 2].tolist()
        tokens, trained = self.tokens[start:stop], self.trained[start:stop]
        if _hash(tokens, trained) != self.hashes[index]:
            raise DamagedError(self.folder, f"document {index + 1:,} of {len(self):,} is not as it was written")
        return tokens, trained


def open_store(path: str, *, name: str, format: str, renderer: Renderer, cache: Path, skip_bad: bool = False,
               max_bad: int = 100, oasst: str = "all", ignore: tuple[str, ...] = (), quiet: bool = False,
               verify: bool = False) -> Store:
    """The tokenised documents of file `path`; tokenised now if that has not been done before, or is damaged.

    With `verify` every document is looked at, not some.
    Raises UserError for a file that cannot be read, that has more than `max_bad` broken records with `skip_bad`, or
    whose tokens break a law (checks.py).
    """
    state = file_state(path)
    unread: dict[str, int] = {}
    conversations = read(path, format=format, skip_bad=skip_bad, oasst=oasst, ignore=ignore, unread=unread)
    sha256 = content_digest(path, cache)
    settings = [LAYOUT, sha256, name, path, format, skip_bad, max_bad, oasst,
                sorted(ignore), renderer.fingerprint()]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder, sample = cache / key, None if verify else SAMPLE
    if not (store := _opened(folder, sample)):
        cache.mkdir(parents=True, exist_ok=True)
        with _only_process(cache / f"{key}.lock"):
            if not (store := _opened(folder, sample)):
                partial = cache / f"{key}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    report = Report(name, path, renderer.template.name, sha256, unread=unread)
                    bar = tqdm(conversations, desc=f"tokenise {name}", unit=" conversations", disable=quiet or None)
                    _write(partial, iter(bar), renderer, report, max_bad)
                    _seal(partial, report, key)
                    if file_state(path) != state:  # its tokens would be found under the key of what it was before
                        raise UserError(f"{path}: changed while it was read; start again when it is complete")
                    os.rename(partial, folder)
                    _sync(cache)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
                store = Store(folder, sample)
    return store


def _opened(folder: Path, sample: int | None) -> Store | None:
    """The store in `folder`; None: there is none, or it was damaged, which is said."""
    try:
        return Store(folder, sample) if folder.exists() else None
    except DamagedError as error:
        print(error, file=sys.stderr)
        return None


@contextmanager
def _only_process(lock: Path) -> Iterator[None]:
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when a process dies
        yield


@dataclass
class Batch:
    """Records that are tokenised together, in the file's order."""

    rendered: Rendered
    loose: list[int]
    skipped: list[Skipped]


def _write(folder: Path, conversations: Iterator[Conversation | Skipped], renderer: Renderer, report: Report,
           max_bad: int) -> None:
    laws, end = Laws(renderer), 0
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "trained.bin", "wb") as trained_file:
        for batch in _ahead(_batches(conversations, renderer)):
            documents = _encoded(batch, renderer)
            _count_skipped(report, batch.skipped, max_bad)
            report.read += len(batch.rendered.conversations) + len(batch.skipped)
            learnable = documents.targets() > 0
            for i in np.flatnonzero(~learnable):
                where = batch.rendered.conversations[i]
                report.skip("nothing trained", f"{where.source}:{where.line}")
            documents = documents.only(learnable)
            kept = [batch.rendered.conversations[i] for i in np.flatnonzero(learnable)]
            laws.check(documents, kept)
            tokens_file.write(documents.ids.data)
            trained_file.write(documents.trained.data)
            chunks["offsets"].append(end + documents.offsets[:-1])
            chunks["targets"].append(documents.targets())
            chunks["turns"].append(np.array([len(conversation.turns) for conversation in kept], dtype=np.int64))
            if kept:  # reduceat needs a document
                chunks["largest"].append(np.maximum.reduceat(documents.ids, documents.offsets[:-1]))
            chunks["lines"].append(np.array([conversation.line for conversation in kept], dtype=np.int64))
            chunks["hashes"].append(np.array([_hash(documents.ids[start:stop], documents.trained[start:stop])
                                              for start, stop in pairwise(documents.offsets.tolist())], np.uint64))
            chunks["loose"].append(np.array(batch.loose, dtype=np.uint64)[learnable])
            end += len(documents.ids)
            _count_kept(report, documents, kept)
    chunks["offsets"].append(np.array([end]))
    for name, arrays in chunks.items():
        dtype = np.uint64 if name in ("hashes", "loose") else np.int64
        np.save(folder / f"{name}.npy", np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype))


def _seal(folder: Path, report: Report, key: str) -> None:
    """Write the report and the digests of the other files; after that all of it is on the disk."""
    files = {file.name: _described(file) for file in sorted(folder.iterdir())}
    signed = _signed(asdict(report), files, key)
    (folder / "report.json").write_text(json.dumps(signed, ensure_ascii=False), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _signed(report: dict[str, Any], files: dict[str, Any], key: str) -> dict[str, Any]:
    content = json.dumps([report, files, key])
    return {"report": report, "files": files, "sha256": hashlib.sha256(content.encode()).hexdigest()}


def _described(file: Path) -> int | str:
    """The size of a file of documents, which have hashes; of the others the digest."""
    return file.stat().st_size if file.suffix == ".bin" else hashlib.sha256(file.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _batches(items: Iterator[Conversation | Skipped], renderer: Renderer) -> Iterator[Batch]:
    conversations, skipped, characters = [], [], 0
    for item in map(renderer.renderable, items):
        if isinstance(item, Conversation):
            conversations.append(item)
            characters += sum([len(turn.content) + len(turn.context) for turn in item.turns])
        else:
            skipped.append(item)
        if len(conversations) + len(skipped) >= BATCH or characters > BATCH_CHARACTERS:
            yield Batch(render(conversations, renderer), [loose_hash(c) for c in conversations], skipped)
            conversations, skipped, characters = [], [], 0
    if conversations or skipped:
        yield Batch(render(conversations, renderer), [loose_hash(c) for c in conversations], skipped)


def _encoded(batch: Batch, renderer: Renderer) -> Documents:
    """The documents of `batch`, without those whose text the tokenizer cannot take: they join the skipped."""
    try:
        return encode(batch.rendered, renderer)
    except TokenizerError:
        conversations, loose = batch.rendered.conversations, batch.loose
        good = []
        for i, conversation in enumerate(conversations):
            try:
                encode(render([conversation], renderer), renderer)
                good.append(i)
            except TokenizerError as error:
                batch.skipped.append(Skipped("the tokenizer cannot take this text", str(error), conversation.source,
                                             conversation.line))
        batch.rendered, batch.loose = render([conversations[i] for i in good], renderer), [loose[i] for i in good]
        return encode(batch.rendered, renderer)


def _ahead(items: Iterator[Batch]) -> Iterator[Batch]:
    """The same items; the next is made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _hash(tokens: Any, trained: Any) -> int:
    """64 bits of the token ids and the mask of a document, both of them contiguous in memory."""
    digest = hashlib.blake2b(tokens, digest_size=8)
    digest.update(trained)
    return int.from_bytes(digest.digest(), "little")


def _count_skipped(report: Report, skipped: list[Skipped], max_bad: int) -> None:
    for item in skipped:
        report.skip(item.reason, f"{item.source}:{item.line}: {item.detail}")
    broken = [reason for reason in report.skipped if reason in BROKEN]
    if sum(report.skipped[reason] for reason in broken) > max_bad:
        raise UserError(f"{report.path}: more than data.max_bad = {max_bad} broken records; the first: "
                        f"{report.examples[broken[0]]}")


def _count_kept(report: Report, documents: Documents, kept: list[Conversation]) -> None:
    for conversation in kept:
        for note in conversation.notes:
            report.change(note, f"{conversation.source}:{conversation.line}")
    report.kept += len(kept)
    report.turns += sum([len(conversation.turns) for conversation in kept])
    report.words += int(documents.words.sum())
    report.content_tokens += int(documents.content_tokens.sum())
    report.tokens += len(documents.ids)
    report.target_tokens += int(documents.trained.sum())
    report.largest_id = max(report.largest_id, int(documents.ids.max(initial=0)))
