"""Tokenised conversations in memory-mapped files, made once and found again by their content.

    <cache>/<key>/tokens.bin    uint32, all documents one after another
                  trained.bin   uint8, the loss mask: 1 where the token is trained
                  offsets.npy   (documents + 1,) int64
                  targets.npy   (documents,) int64: trained tokens of each
                  turns.npy     (documents,) int64: turns of each
                  largest.npy   (documents,) int64: the largest token id of each
                  lines.npy     (documents,) int64: the line each came from, plus LINES times the number of its file
                  numbers.npy   (documents,) int64: which of its record's documents each is, from 0
                  hashes.npy    (documents,) uint64: of ids and mask, equal for exact duplicates
                  loose.npy     (documents,) uint64: of what is not punctuation, equal for near duplicates
                  weights.npy   (rows,) ROW, only if weights other than 0 and 1 are in the file: see below
                  report.json   what was read, kept and left out, with the reasons; the sizes of the files above, and
                                the digests of the index (.npy) and of report.json itself

In a document with weights other than 1, a byte of trained.bin is not 1 but k, for the k-th of its rows in weights.npy:

    weights of document 7  0 0 .5 .5 0 2 2 2     trained.bin  0 0 1 1 0 2 2 2     rows  (7, .5, 2), (7, 2, 3)

The key is a hash of everything that the tokens depend on: the file's bytes, how it is read, the tokenizer, the
template, which tokens are trained, the version of the renderer; but not `seq_len`, since a run decides what is too long
(dataset.py). A folder gets its name in one rename, after its bytes are on the disk, so a folder that exists is
complete; if several processes want it, one makes it and the others wait.

Disks lose bits. So we compare the index with its digests when we open it, and each document with its hash whenever we
read it. A damaged store is set aside and made again. Memory grows with the file by 64 bytes a document only (with
weights 8 more, and 24 a row).
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minisft.config import DataConfig, Source
from minisft.data.chat import EncodedDocuments, Piece, Renderer
from minisft.data.checks import oddities, validate
from minisft.data.conversation import Conversation, Skipped
from minisft.data.tokenizer import TokenizerError
from minisft.errors import UserError
from minisft.files import data_files, file_and_split, regular_file, sync

# Rejects a file of another kind at once, reads it when iterated, and counts in the dict the fields nobody reads.
Reader = Callable[[Source, DataConfig, dict[str, int]], Iterator[Conversation | Skipped]]
LAYOUT = 7  # of these files: raise it when they change, so that old folders are not opened
BATCH = 1024  # conversations that are tokenised together
BATCH_CHARACTERS = 1 << 22  # or fewer conversations, if they are long
SAMPLE = 256  # documents that are read when a store is opened
LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # what a disk reports for files that it lost
ARRAYS = ("offsets", "targets", "turns", "largest", "lines", "numbers", "hashes", "loose")
ROW = np.dtype([("document", np.int64), ("weight", np.float64), ("tokens", np.int64)])  # tokens of that weight
BROKEN = ("bad JSON", "invalid UTF-8", "bad row")  # what counts against max_bad: the record itself, not what it says
LINES = 2**40  # more than a file has
RACY_NS = 2_000_000_000  # the coarsest clock of a file system in use: FAT's two seconds
Array = np.ndarray
NO_TABLE = np.zeros(0)  # of a document whose weights are 0 and 1


@dataclass
class Report:
    """What became of a file. Counts of tokens are of the documents kept."""

    name: str
    path: str
    template: str
    sha256: str = ""  # of the file's bytes; of several files, of their digests
    read: int = 0
    kept: int = 0
    turns: int = 0
    words: int = 0  # of the contents of all that is in the store, separated by white space
    content_tokens: int = 0  # of the contents, without the template's own; per word they show what a language costs
    tokens: int = 0
    target_tokens: int = 0
    largest_id: int = 0  # to be compared with the model's vocabulary
    truncated: int = 0
    duplicates: int = 0  # documents that exactly repeat an earlier one, here or in an earlier source
    lost_target_tokens: int = 0  # trained tokens of documents that were too long
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> conversations left out
    changed: dict[str, int] = field(default_factory=dict)  # what was done to a conversation -> those in the store
    examples: dict[str, str] = field(default_factory=dict)  # reason -> where it first occurred
    unread: dict[str, int] = field(default_factory=dict)  # field that nothing reads -> records that have it
    odd: dict[str, int] = field(default_factory=dict)  # what is seldom meant (checks.ODD) -> conversations that have it
    files: list[str] = field(default_factory=list)  # of a folder or a glob

    def count(self, counts: dict[str, int], reason: str, where: str, number: int = 1) -> None:
        """Count conversations in `skipped` or `changed`, and remember where the first one is."""
        counts[reason] = counts.get(reason, 0) + number
        self.examples.setdefault(reason, where)


class DamagedError(OSError):
    """A store is not as it was written. It has been set aside, so the next opening makes it again."""

    def __init__(self, folder: Path, what: object):
        aside = folder.with_suffix(".damaged")  # processes that have it open keep it
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):  # another process was first, or nobody can
                os.rename(folder, aside)
        super().__init__(f"{folder}: damaged ({what}); it is made again from its file when it is opened")


class Store:
    """The documents of one file, opened from its folder. Raises DamagedError. Opening checks the whole index and
    `sample` of the documents (None: all); each document is checked when it is read."""

    def __init__(self, folder: Path, sample: int | None = None):
        self.folder, self.key = folder, folder.name
        try:
            saved = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            if saved != _with_digest(saved["report"], saved["files"], self.key):
                raise ValueError("report.json is not as it was written")
            self.report = Report(**saved["report"])
            for name, expected in saved["files"].items():
                if _described(folder / name) != expected:
                    raise ValueError(f"{name} is not as it was written")
            (self.offsets, self.num_loss_tokens, self.turns, self.largest, self.lines, self.numbers,
             self.hashes, self.near_duplicate_hashes) = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
                                            for name in ARRAYS)
            has_weights = "weights.npy" in saved["files"]
            self.weight_rows = np.load(folder / "weights.npy") if has_weights else np.zeros(0, ROW)
            if has_weights:
                self._first_row = np.searchsorted(self.weight_rows["document"], np.arange(len(self) + 1))
            if len(self):  # an empty file cannot be mapped; slicing a plain array is ten times as fast as a memmap
                self.tokens, self.codes = (np.asarray(np.memmap(folder / name, dtype, "r")) for name, dtype in
                                               (("tokens.bin", np.uint32), ("trained.bin", np.uint8)))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno not in LOST:  # "permission denied" is not damage
                raise
            raise DamagedError(folder, error) from None
        for index in np.linspace(0, len(self) - 1, min(len(self), sample or len(self)), dtype=np.int64).tolist():
            self.document(index)

    def __len__(self) -> int:
        return len(self.lines)

    def origin(self, index: int) -> tuple[str, int]:
        """File and line that a document came from."""
        number, line = divmod(int(self.lines[index]), LINES)
        return (self.report.files or [self.report.path])[number], line

    @property
    def records(self) -> Array:
        """(documents,) int64: the number, from 1, of the record that each came from. A line may have many."""
        return np.cumsum((np.diff(self.lines, prepend=0) != 0) | (np.diff(self.numbers, prepend=0) <= 0))

    def document(self, index: int) -> tuple[Array, Array]:
        """Token ids (L,) and loss weights (L,) of a document: uint8 if all are 0 or 1, otherwise float64."""
        return self._read(index, 0, int(self.offsets[index + 1] - self.offsets[index]), self.hashes[index])

    def part(self, index: int, first: int, length: int, digest: int) -> tuple[Array, Array]:
        """The same of `length` tokens of a document from `first` on, whose `part_hash` is `digest`. The first one is
        not trained: nothing in the part could predict it."""
        tokens, weights = self._read(index, first, length, digest)
        weights = weights.copy()
        weights[:1] = 0
        return tokens, weights

    def part_hash(self, index: int, first: int, length: int) -> int:
        """64 bits of a part of a document."""
        return _hash(*self._slice(index, first, length))

    def _slice(self, index: int, first: int, length: int) -> tuple[Array, Array, Array]:
        """Token ids and bytes of trained.bin, and the weights that the bytes stand for, if not for 0 and 1."""
        start, table = int(self.offsets[index]) + first, NO_TABLE
        if len(self.weight_rows) and len(rows := self.weight_rows[slice(*self._first_row[index : index + 2].tolist())]):
            table = np.append(0.0, rows["weight"])
        return self.tokens[start : start + length], self.codes[start : start + length], table

    def _read(self, index: int, first: int, length: int, digest: int) -> tuple[Array, Array]:
        tokens, codes, table = self._slice(index, first, length)
        if _hash(tokens, codes, table) != digest:
            raise DamagedError(self.folder, f"document {index + 1:,} of {len(self):,} is not as it was written")
        return tokens, table[codes] if len(table) else codes

    @property
    def loss_weights(self) -> Array:
        """(documents,) sum of each one's weights: `num_loss_tokens` if all in the file are 0 or 1, or float64."""
        if not len(rows := self.weight_rows):
            return self.num_loss_tokens
        sums = np.bincount(rows["document"], rows["weight"] * rows["tokens"], minlength=len(self))
        return np.where(sums > 0, sums, self.num_loss_tokens)

    @property
    def weighted_tokens(self) -> Array:
        """(documents,) int64: trained tokens of each with a weight other than 1."""
        rows = self.weight_rows[self.weight_rows["weight"] != 1]
        return np.bincount(rows["document"], rows["tokens"], minlength=len(self)).astype(np.int64)


def open_store(source: Source, data: DataConfig, renderer: Renderer, read: Reader, *, quiet: bool = False,
               verify: bool = False) -> Store:
    """The tokenised documents of a file; tokenised now if that has not been done before, or if the store is damaged.
    `verify` checks every stored document instead of some. Raises UserError for a file that cannot be read, that has
    more than data.max_bad broken records, or whose tokens break a law (checks.py)."""
    path, cache, state = source.path, Path(data.cache), _source_state(source.path)
    report = Report(source.name, path, renderer.template.name)
    report.files = [file for file in data_files(path) if file != path]
    conversations = read(source, data, report.unread)  # a file of another kind is rejected before all of it is hashed
    digests = [_content_digest(file_and_split(file)[0], cache) for file in report.files or [path]]
    report.sha256 = hashlib.sha256(json.dumps(digests).encode()).hexdigest() if digests[1:] else digests[0]
    more = {"fields": source.fields, "files": report.files}
    settings = [LAYOUT, report.sha256, source.name, path, source.format, data.skip_bad, data.max_bad, data.oasst,
                sorted(data.ignore), renderer.fingerprint(), *([more] if any(more.values()) else [])]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder, partial, sample = cache / key, cache / f"{key}.partial", None if verify else SAMPLE
    if store := _opened(folder, sample):
        return store
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when a process dies
        if store := _opened(folder, sample):  # another process made it while we waited
            return store
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            bar = tqdm(conversations, desc=f"tokenise {source.name}", unit=" conversations", disable=quiet or None)
            _write(partial, iter(bar), renderer, report, data.max_bad)
            files = {file.name: _described(file) for file in sorted(partial.iterdir())}
            signed = _with_digest(asdict(report), files, key)
            (partial / "report.json").write_text(json.dumps(signed, ensure_ascii=False), encoding="utf-8")
            for written in (*partial.iterdir(), partial):
                sync(written)
            if _source_state(path) != state:  # or its tokens would be found under the key of what it was before
                raise UserError(f"{path}: changed while it was read; start again when it is complete")
            os.rename(partial, folder)
            sync(cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
        return Store(folder, sample)


def _opened(folder: Path, sample: int | None) -> Store | None:
    """The store in `folder`, if there is an intact one. Prints what is wrong with a damaged one."""
    try:
        return Store(folder, sample) if folder.exists() else None
    except DamagedError as error:
        print(error, file=sys.stderr)
        return None


class Rendered(NamedTuple):
    """A record, and what is made of a conversation before it is tokenised."""

    item: Conversation | Skipped
    pieces: list[Piece]
    near_duplicate: int = 0  # near_duplicate_hash


def _batches(found: Iterator[Conversation | Skipped], renderer: Renderer) -> Iterator[list[Rendered]]:
    """Records that are tokenised together, in the file's order."""
    batch: list[Rendered] = []
    characters = 0
    for item in map(renderer.renderable, found):
        batch.append(Rendered(item, []) if isinstance(item, Skipped) else
                     Rendered(item, renderer.pieces(item), near_duplicate_hash(item)))
        characters += sum([len(piece.text) for piece in batch[-1].pieces])
        if len(batch) >= BATCH or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[Rendered], renderer: Renderer) -> EncodedDocuments:
    """The documents of `batch`. A skipped record becomes an empty document, and so does a text that the tokenizer
    rejects."""
    with suppress(TokenizerError):
        return renderer.encode([each.pieces for each in batch])
    for i, (item, pieces, _) in enumerate(batch):
        try:
            renderer.encode([pieces])
        except TokenizerError as error:
            batch[i] = Rendered(Skipped("the tokenizer cannot take this text", str(error), item.source, item.line), [])
    return renderer.encode([each.pieces for each in batch])


def _write(folder: Path, found: Iterator[Conversation | Skipped], renderer: Renderer, report: Report,
           max_bad: int) -> None:
    """Tokenise, check and write everything except report.json; `report` is filled in."""
    parts = {name: [np.zeros(0, np.uint64 if name in ("hashes", "loose") else np.int64)] for name in ARRAYS}
    batches, end, rows = _batches(found, renderer), 0, [np.zeros(0, ROW)]
    numbers = {file: i for i, file in enumerate(report.files)}
    with (open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "trained.bin", "wb") as mask_file,
          ThreadPoolExecutor(max_workers=1) as thread):
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)  # rendered while this one is tokenised
            documents, kept = _encode(batch, renderer), []
            learnable = documents.num_loss_tokens > 0
            for (item, *_), keep in zip(batch, learnable.tolist(), strict=True):
                where = f"{item.source}:{item.line}"
                if isinstance(item, Skipped):
                    report.count(report.skipped, item.reason, f"{where}: {item.detail}")
                elif keep:
                    kept.append(item)
                    for note in item.notes:
                        report.count(report.changed, note, where)
                    for what, text in oddities(item):
                        report.count(report.odd, what, f"{where}: {text}")
                else:
                    report.count(report.skipped, "nothing trained", where)
            broken = [reason for reason in report.skipped if reason in BROKEN]
            if sum(report.skipped[reason] for reason in broken) > max_bad:
                raise UserError(f"{report.path}: more than data.max_bad = {max_bad} broken records; the first: "
                                f"{report.examples[broken[0]]}")
            documents = documents.only(learnable)
            validate(documents, kept, renderer)
            report.read += len(batch)
            report.words += int(documents.words.sum())
            report.content_tokens += int(documents.content_tokens.sum())
            ids, offsets = documents.ids, documents.offsets
            codes, hashes, weights = _coded(documents, first=report.kept)
            tokens_file.write(ids.data)
            mask_file.write(codes.data)
            rows.append(weights)
            for name, values in {
                    "offsets": end + offsets[:-1], "targets": documents.num_loss_tokens,
                    "turns": [len(conversation.turns) for conversation in kept],
                    "largest": np.maximum.reduceat(ids, offsets[:-1]) if kept else [],  # reduceat needs a document
                    "lines": [numbers.get(each.source, 0) * LINES + each.line for each in kept],
                    "numbers": [each.number for each in kept], "hashes": hashes,
                    "loose": np.array([each.near_duplicate for each in batch], np.uint64)[learnable]}.items():
                parts[name].append(np.array(values, parts[name][0].dtype))
            end += len(ids)
            report.kept += len(kept)
    parts["offsets"].append(np.array([end]))
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    if len(weighted := np.concatenate(rows)):
        np.save(folder / "weights.npy", weighted)
    report.turns, report.tokens = int(arrays["turns"].sum()), end
    report.target_tokens = int(arrays["targets"].sum())
    report.largest_id = int(arrays["largest"].max(initial=0))


def _coded(documents: EncodedDocuments, *, first: int) -> tuple[Array, list[int], Array]:
    """The bytes of trained.bin for `documents`, their hashes, and their rows of weights.npy. `first` is the number of
    the first one in the store."""
    codes, hashes, rows = documents.loss_mask.astype(np.uint8), [], []
    weighted = documents.weights != codes
    any_weighted = bool(weighted.any())
    for number, (i, j) in enumerate(pairwise(documents.offsets.tolist()), first):
        table = NO_TABLE
        if any_weighted and weighted[i:j].any():  # 0, that of the first token, comes first in the table
            table, codes[i:j], counts = np.unique(documents.weights[i:j], return_inverse=True, return_counts=True)
            rows += [(number, *row) for row in zip(table[1:].tolist(), counts[1:].tolist(), strict=True)]
        hashes.append(_hash(documents.ids[i:j], codes[i:j], table))
    return codes, hashes, np.array(rows, ROW)


def near_duplicate_hash(conversation: Conversation) -> int:
    """64 bits, equal for conversations whose texts differ in case, spacing, punctuation and canonically equivalent
    Unicode (NFC, NFD) alone, in any roles, with the same tools. The four letters i of Turkish count as one: files are
    often cased by the rules of English. Punctuation is Unicode's: + and < are symbols and count, - and / do not."""
    nfc = partial(unicodedata.normalize, "NFC")
    text = "".join([part for turn in conversation.turns for part in (turn.content, turn.context, turn.tool)])
    if conversation.tools or conversation.builtin_tools:
        text += json.dumps([conversation.tools, conversation.builtin_tools])
    bare = (text.encode().translate(_LOWER, _DROPPED) if text.isascii() else
            nfc(nfc(text).casefold().replace("ı", "i")).translate(_KEPT).encode("utf-8"))
    return int.from_bytes(hashlib.blake2b(bare or nfc(text).encode("utf-8"), digest_size=8).digest(), "little")


class _Kept(dict[int, int | None]):
    """For str.translate: letters, digits, symbols and marks stay, such as the vowel signs of Hindi and Thai; not the
    dot that lower case leaves of İ, nor the selectors of an emoji's variant. What it has decided, it remembers."""

    def __missing__(self, code: int) -> int | None:
        character, category = chr(code), unicodedata.category(chr(code))
        stays = character.isalnum() or (category in ("Mn", "Mc", "Sm", "Sc", "So") and not (
            character == "\u0307" or "VARIATION SELECTOR" in unicodedata.name(character, "")))
        self[code] = code if stays else None
        return self[code]


_KEPT = _Kept()
_LOWER = bytes(range(256)).lower()
_DROPPED = bytes(byte for byte in range(128) if _KEPT[byte] is None)


def _hash(tokens: Any, codes: Any, table: Any) -> int:
    """64 bits of the token ids, the mask and the different weights of a document or a part of it, each contiguous in
    memory."""
    digest = hashlib.blake2b(tokens, digest_size=8)
    digest.update(codes)
    digest.update(table)
    return int.from_bytes(digest.digest(), "little")


def _with_digest(report: dict[str, Any], files: dict[str, Any], key: str) -> dict[str, Any]:
    content = json.dumps([report, files, key])
    return {"report": report, "files": files, "sha256": hashlib.sha256(content.encode()).hexdigest()}


def _described(file: Path) -> int | str:
    """The size of a file of documents, which have hashes of their own; the digest of any other."""
    return file.stat().st_size if file.suffix == ".bin" else hashlib.sha256(file.read_bytes()).hexdigest()


def _file_state(path: str) -> list[int]:
    """What changes when the file does; no program can set ctime back. Raises UserError if there is no such file."""
    found = regular_file(path)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _source_state(path: str) -> list[tuple[str, list[int]]]:
    """`_file_state` of every file of a source."""
    return [(file, _file_state(file_and_split(file)[0])) for file in data_files(path)]


def _content_digest(path: str, cache: Path) -> str:
    """SHA-256 of the file's bytes, which are read only if a note in `cache` does not know the file as it is now. As in
    git, no note is written of a file that changed just before it was hashed: within one tick of its file system's clock
    it could change again and keep its times."""
    state, now = _file_state(path), time.time_ns()
    note = cache / f"{state[0]:x}-{state[1]:x}.digest"

    def noted(sha256: str) -> dict[str, str]:  # the seal does not fit a damaged note
        return {"sha256": sha256, "seal": hashlib.sha256(f"{state} {sha256}".encode()).hexdigest()}

    with suppress(OSError, ValueError, LookupError, TypeError):  # unknown or unreadable: read the file itself
        known = json.loads(note.read_text(encoding="utf-8"))
        if known == noted(str(known["sha256"])):
            return str(known["sha256"])
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (remedy: name a file that can be read)") from None
    if _file_state(path) == state and now - max(state[3:]) > RACY_NS:
        cache.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}.lock")
        partial.write_text(json.dumps(noted(sha256)), encoding="utf-8")
        os.replace(partial, note)
    return sha256
