"""Conversations to documents and files to stores, for tests; and the plain encoder that the renderer must equal."""

import hashlib
import json

from minisft.config import DataConfig, Source
from minisft.data import store as store_module
from minisft.data.store import open_store
from minisft.prepare import read_source
from minisft.runs import assemble


def documents_of(renderer, conversations):
    """(ids, weights in the loss) of each conversation, as lists."""
    found = renderer.encode([renderer.pieces(conversation) for conversation in conversations])
    bounds = [(int(a), int(b)) for a, b in zip(found.offsets, found.offsets[1:], strict=False)]
    return [(found.ids[a:b].tolist(), found.weights[a:b].tolist()) for a, b in bounds]


def plain_documents(renderer, conversations):
    """What `documents_of` must be: one piece after another."""
    documents = []
    for conversation in conversations:
        ids, loss_mask = [], []
        for piece in renderer.pieces(conversation):
            tokenizer = renderer.tokenizer
            new = [tokenizer.control[piece.text]] if piece.control else tokenizer.encode(piece.text)
            ids += new
            loss_mask += [piece.trained] * len(new)
        documents.append((ids, [False, *loss_mask[1:]] if ids else []))
    return documents


def store_of(path, renderer, cache, *, name="data", format="auto", read=read_source, verify=False, fields=(),
             **settings):
    """The store of a file; `settings` are keys of data."""
    return open_store(Source(str(path), format=format, name=name, fields=fields), DataConfig(
        cache=str(cache), **settings), renderer, read, quiet=True, verify=verify)


def before_composing(patch):
    """Until `patch` ends, stores are as of versions that compared letters and digits alone, and runs do not record how
    they compared; then call `of_before`."""
    patch.setattr(store_module, "near_duplicate_hash", lambda conversation: int(hashlib.sha256("".join(
        filter(str.isalnum, "".join(turn.content for turn in conversation.turns))).encode()).hexdigest()[:16], 16))
    patch.setattr(assemble, "NEAR_VERSION", None)


def of_before(cache, *without):
    """The one store in `cache`, its report as it was before "near" (and the names `without`) were recorded."""
    [file] = cache.glob("*/report.json")
    saved = json.loads(file.read_text(encoding="utf-8"))
    old = {name: value for name, value in saved["report"].items() if name not in ("near", *without)}
    assert len(old) == len(saved["report"]) - 1 - len(without)
    content = json.dumps([old, saved["files"], file.parent.name])
    signed = {**saved, "report": old, "sha256": hashlib.sha256(content.encode()).hexdigest()}
    file.write_text(json.dumps(signed), encoding="utf-8")
    return file
