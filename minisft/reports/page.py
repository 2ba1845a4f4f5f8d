"""A page that is one file: it needs no network, runs no script, and reads well by day and by night.

The page's own policy forbids the browser to load or run anything; what comes from data is escaped by those who write
it.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from html import escape
from pathlib import Path

from minisft.errors import PATH, UserError, printable

COLOURS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1e21; --faint: #6b7280; --line: #d5d9df }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e4e6ea; --faint: #98a1ae; --line: #363c45 } }
"""
STYLE = COLOURS + """body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
p, figcaption { color: var(--faint); font-size: .85rem }
h1, h2, p { overflow-wrap: anywhere }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def check_outputs(writes: Mapping[str, Path | None], reads: Iterable[str | Path | None] = (), *,
                  appended: Collection[str] = ()) -> None:
    """Raise UserError for an output that nothing can be written to, or that would harm a file, before any work.

    `writes` are the files by the option that names each; `reads` are the files and folders that the command reads.
    What is in such a folder is not replaced, except pages, which people keep beside a run, and .jsonl by the options
    `appended`, which only add to a file of their own. A file may have several names, so they are compared by what they
    are.
    """
    if not any(writes.values()):
        return
    sources = [Path(path) for path in reads if path]
    folders = [path.resolve() for path in sources if path.is_dir()]
    inside = [file for folder in folders for file in folder.iterdir()]
    read, taken = {_identity(path) for path in sources}, set[object]()
    within = {_identity(file) for file in inside if file.is_file()}
    for option, file in writes.items():
        if file is None:
            continue
        where = f"{option} {printable(file, PATH)}"
        check_output(file, where)
        here, nested = _identity(file), file.exists() and any(folder in file.resolve().parents for folder in folders)
        kept_there = file.suffix == ".html" or (option in appended and file.suffix == ".jsonl")
        if here in read or ((here in within or nested) and not kept_there):
            raise UserError(f"{where}: is a file that this command reads, and would be written over; name another file")
        if here in taken:
            raise UserError(f"{where}: is named twice, and one would overwrite the other; name another file")
        taken.add(here)


def check_output(file: Path, where: str) -> None:
    """Raise UserError, which begins with `where`, for what is no regular file, and no name for a new one."""
    if file.is_symlink():
        raise UserError(f"{where}: is a link; name the file that it leads to, {printable(file.resolve(), PATH)}")
    if not file.parent.is_dir():
        raise UserError(f"{where}: there is no folder {printable(file.parent, PATH)}; make it first")
    if file.is_dir():
        raise UserError(f"{where}: is a folder; name a file")
    if file.exists() and not file.is_file():
        raise UserError(f"{where}: is a device, a pipe or a socket; name a regular file")


def _identity(file: Path) -> object:
    """What `file` is, whatever it is called: links to one file are equal."""
    try:
        found = file.stat()
    except OSError:  # not there yet
        return file.resolve()
    return found.st_dev, found.st_ino


def render(title: str, style: str, body: str) -> str:
    """The page as HTML: `title` is plain text, `body` is HTML, `style` is added to the common one."""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n<body>\n{body}</body></html>\n")


def figure(svg: str, caption: str) -> str:
    """A figure as HTML; the caption is plain text."""
    return f"<figure>{svg}\n<figcaption>{escape(caption)}</figcaption></figure>\n"


def write(file: Path, text: str | Iterable[str]) -> None:
    """Write `text`, all of it or nothing, into a regular file. Raises UserError for a link, a device, a folder."""
    check_output(file, printable(file, PATH))
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    out = open(partial, "x", encoding="utf-8")  # noqa: SIM115 (what is there already is not ours to delete)
    try:
        with out:
            out.writelines([text] if isinstance(text, str) else text)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_json(file: Path, found: object) -> None:
    """The figures of a command as JSON, for people who read it as well."""
    write(file, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
