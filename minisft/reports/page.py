"""A page that is one file: it needs no network, runs no script, and reads well in light and dark mode.

The page's own policy forbids the browser to load or run anything; whoever writes the body escapes what comes from data.
Pages are passed on, so paths on them are relative. Also the files that a command writes: none replaces a file that the
command reads.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from html import escape
from pathlib import Path

from minisft.errors import PATH, UserError, printable

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def check_outputs(writes: Mapping[str, Path | None], reads: Iterable[str | Path | None] = (), *,
                  appended: Collection[str] = ()) -> None:
    """Raise UserError, before any work, for an output that cannot be written or would damage a file.

    `writes` maps each option to the file it names; `reads` are the files and folders that the command reads. Files in
    such a folder are not replaced, except pages, which people keep beside a run, and .jsonl files of the options
    `appended`, which only add to a file of their own. A file may have several names, so we compare inodes.
    """
    sources = [Path(path) for path in reads if path] if any(writes.values()) else []
    folders = [path.resolve() for path in sources if path.is_dir()]
    read, taken = {_identity(path) for path in sources}, set[object]()
    within = {_identity(file) for folder in folders for file in folder.iterdir() if file.is_file()}
    for option, file in writes.items():
        if file is None:
            continue
        check_output(file, where := f"{option} {printable(file, PATH)}")
        identity = _identity(file)
        nested = identity in within or (file.exists() and any(folder in file.resolve().parents for folder in folders))
        kept_there = file.suffix == ".html" or (option in appended and file.suffix == ".jsonl")
        if identity in read or (nested and not kept_there):
            raise UserError(f"{where}: this command reads that file and would overwrite it; name another file")
        if identity in taken:
            raise UserError(f"{where}: named twice, and one output would overwrite the other; name another file")
        taken.add(identity)


def check_output(file: Path, where: str) -> None:
    """Raise UserError, beginning with `where`, unless `file` is a regular file or the name of a new one."""
    if file.is_symlink():
        raise UserError(f"{where}: is a link; name the file that it leads to, {printable(file.resolve(), PATH)}")
    if not file.parent.is_dir():
        raise UserError(f"{where}: folder {printable(file.parent, PATH)} does not exist; create it first")
    if file.is_dir():
        raise UserError(f"{where}: is a folder; name a file")
    if file.exists() and not file.is_file():
        raise UserError(f"{where}: is a device, a pipe or a socket; name a regular file")


def _identity(file: Path) -> object:
    """Equal for all names of one file."""
    try:
        return (found := file.stat()).st_dev, found.st_ino
    except OSError:  # it does not exist yet
        return file.resolve()


def relative(text: str) -> str:
    """`text` without the folders of this machine, because a page is passed on: "/data/llama/8b"  ->  "…/llama/8b".

    What lies in the working folder or in a home stays whole: "runs/a/final", "~/models/llama".
    """
    def shorten(match: re.Match[str]) -> str:
        path = match[0].removeprefix(f"{os.getcwd()}/")
        path = re.sub(r"^/(root|(home|Users)/[^/]+)/", "~/", path)
        return "…/" + "/".join(path.rstrip("/").split("/")[-2:]) if path.startswith("/") else path
    path = r'''(?<=")/[^"\n]++(?=")|(?<![\w.:/<~…])/(?:[^\s/"'<>,:;]++/)++[^\s/"'<>,:;]*+'''
    return re.sub(path, shorten, text)


def style(*names: str) -> str:
    """The named style sheets of this folder."""
    return "".join(Path(__file__).with_name(f"{name}.css").read_text(encoding="utf-8") for name in names)


def render(title: str, sheet: str, body: str) -> str:
    """The page as HTML: `title` is plain text, `body` is HTML, `sheet` is a style sheet besides the common ones."""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
            f"<style>\n{style('colours', 'page', sheet)}</style></head>\n<body>\n{body}</body></html>\n")


def write(file: Path, text: str | Iterable[str]) -> None:
    """Write `text` into a regular file, all of it or nothing. Raises UserError for a link, a device or a folder."""
    check_output(file, printable(file, PATH))
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    out = open(partial, "x", encoding="utf-8")  # noqa: SIM115 (a file that exists is not ours to delete)
    try:
        with out:
            out.writelines([text] if isinstance(text, str) else text)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_json(file: Path, found: object) -> None:
    """Write the figures of a command as JSON that people can read."""
    write(file, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
