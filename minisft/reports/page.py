"""A page that is one file: it needs no network, runs no script, and reads well by day and by night.

The page's own policy forbids the browser to load or run anything; what comes from data is escaped by those who write
it.
"""

import os
from html import escape
from pathlib import Path

from minisft.errors import UserError

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


def check_writable(file: Path, option: str) -> None:
    """Raise UserError where nothing can be written at `file`, before any work is done for it."""
    if not file.parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {file.parent}; make it first")
    if file.is_dir():
        raise UserError(f"{option} {file}: is a folder; give the name of a file")


def render(title: str, style: str, body: str) -> str:
    """The page as HTML: `title` is plain text, `body` is HTML, `style` is added to the common one."""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n<body>\n{body}</body></html>\n")


def figure(svg: str, caption: str) -> str:
    """A figure as HTML; the caption is plain text."""
    return f"<figure>{svg}\n<figcaption>{escape(caption)}</figcaption></figure>\n"


def write(file: Path, text: str) -> None:
    """Write `text`, all of it or nothing."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
