"""Tokenised conversations in memory-mapped files, made once and found again by their content.

    <cache>/<key>/tokens.bin    uint32, all documents one after another
                  trained.bin   uint8, 1 where the token is trained
                  offsets.npy   (documents + 1,) int64
                  targets.npy   (documents,) int64: trained tokens of each
                  lines.npy     (documents,) int64: where each came from
                  hashes.npy    (documents,) uint64: of ids and mask, equal for exact duplicates
                  report.json   what was read, kept, and left out for which reason

The key is a hash of everything that the tokens depend on: the file's bytes, how it is read, the tokenizer, the
template, which tokens are trained, the version of the renderer. A folder appears under its name in one rename, so one
that exists is complete; of several processes that want it, one makes it and the others wait. `seq_len` is not part of
it: what is too long is decided when a run opens the data (dataset.py).
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisft.data.chat import Renderer
from minisft.data.formats import Conversation, Skipped, read
from minisft.errors import UserError

BATCH = 1024  # conversations that are tokenised together
BROKEN = ("bad JSON", "invalid UTF-8")  # reasons that count against max_bad: the record itself, not what it says


@dataclass
class Report:
    """What became of a file. Counts of tokens are of the documents kept."""

    name: str
    path: str
    template: str
    read: int = 0
    kept: int = 0
    turns: int = 0
    tokens: int = 0
    target_tokens: int = 0
    largest_id: int = 0  # to be held against the model's vocabulary
    truncated: int = 0
    duplicates: int = 0  # documents that are exactly another one before them, here or in an earlier source
    lost_target_tokens: int = 0  # trained tokens of documents that were too long
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> conversations
    examples: dict[str, str] = field(default_factory=dict)  # reason -> where it was first met

    def skip(self, reason: str, where: str, count: int = 1) -> None:
        """Count conversations left out, and remember the first."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count
        self.examples.setdefault(reason, where)


class Store:
    """The documents of one file, opened from its folder. Raises UserError for a folder that lost some of its bytes."""

    def __init__(self, folder: Path):
        self.key = folder.name
        try:
            self.offsets = np.load(folder / "offsets.npy")
            self.targets = np.load(folder / "targets.npy")
            self.lines = np.load(folder / "lines.npy")
            self.hashes = np.load(folder / "hashes.npy")
            self.report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
            if len(self):  # an empty file cannot be mapped
                size = int(self.offsets[-1])
                self.tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r", shape=size)
                self.trained = np.memmap(folder / "trained.bin", dtype=np.uint8, mode="r", shape=size)
        except (FileNotFoundError, EOFError, ValueError, TypeError) as error:
            raise UserError(f"{folder}: damaged ({error}); delete the folder, and it is made again") from None

    def __len__(self) -> int:
        return len(self.lines)


def open_store(path: str, *, name: str, format: str, renderer: Renderer, cache: Path, skip_bad: bool = False,
               max_bad: int = 100, oasst: str = "all", quiet: bool = False) -> Store:
    """The tokenised documents of file `path`; tokenised now if that has not been done before.

    Raises UserError for a file that cannot be read, or that has more than `max_bad` broken records with `skip_bad`.
    """
    key = _key(path, (name, path, format, skip_bad, max_bad, oasst, renderer.fingerprint()))
    folder = cache / key
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _only_process(cache / f"{key}.lock"):
            if not folder.exists():
                partial = cache / f"{key}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    conversations = read(path, format=format, skip_bad=skip_bad, oasst=oasst)
                    bar = tqdm(conversations, desc=f"tokenise {name}", unit=" conversations", disable=quiet or None)
                    _write(partial, iter(bar), renderer, Report(name, path, renderer.template.name), max_bad)
                    os.rename(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return Store(folder)


def _key(path: str, settings: tuple) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; data.train and data.eval are files") from None
    return digest.hexdigest()[:32]


@contextmanager
def _only_process(lock: Path) -> Iterator[None]:
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when a process dies
        yield


def _write(folder: Path, conversations: Iterator[Conversation | Skipped], renderer: Renderer, report: Report,
           max_bad: int) -> None:
    offsets, targets, lines, hashes = [0], [], [], []
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "trained.bin", "wb") as trained_file:
        while batch := [renderer.renderable(item) for item in islice(conversations, BATCH)]:
            kept = [item for item in batch if isinstance(item, Conversation)]
            for item in batch:
                if isinstance(item, Skipped):
                    report.skip(item.reason, f"{item.source}:{item.line}: {item.detail}")
            report.read += len(batch)
            broken = [reason for reason in report.skipped if reason in BROKEN]
            if sum(report.skipped[reason] for reason in broken) > max_bad:
                raise UserError(f"{report.path}: more than data.max_bad = {max_bad} broken records; the first: "
                                f"{report.examples[broken[0]]}")
            rendered = [renderer.pieces(conversation) for conversation in kept]
            for conversation, (ids, trained) in zip(kept, renderer.encode(rendered), strict=True):
                if not any(trained):
                    report.skip("nothing trained", f"{conversation.source}:{conversation.line}")
                    continue
                tokens, mask = np.array(ids, dtype=np.uint32).tobytes(), np.array(trained, dtype=np.uint8).tobytes()
                tokens_file.write(tokens)
                trained_file.write(mask)
                hashes.append(int.from_bytes(hashlib.blake2b(tokens + mask, digest_size=8).digest(), "little"))
                offsets.append(offsets[-1] + len(ids))
                targets.append(sum(trained))
                lines.append(conversation.line)
                report.kept += 1
                report.turns += len(conversation.turns)
                report.tokens += len(ids)
                report.largest_id = max(report.largest_id, max(ids))
                report.target_tokens += targets[-1]
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    np.save(folder / "targets.npy", np.array(targets, dtype=np.int64))
    np.save(folder / "lines.npy", np.array(lines, dtype=np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, dtype=np.uint64))
    (folder / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")
