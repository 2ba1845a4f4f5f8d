"""Conversations to documents and files to stores, for tests; and the plain encoder that the renderer must equal."""


from minisft.config import DataConfig, Source
from minisft.data.store import open_store
from minisft.prepare import read_source


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
