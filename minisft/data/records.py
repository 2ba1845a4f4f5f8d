"""Files become JSON records: bytes in, (line, object) out, one record in memory at a time.

An array and JSON lines are told apart by their first byte. Both are cut into records first and decoded after, so that
every error has its file, line and byte, one bad record can pass without losing the rest, and an array of any size
streams. A record that is not JSON stops the run (or is handed on, with `skip_bad`); an array without its end always
stops it, because nobody knows what else is missing.
"""

import json
import re
import reprlib
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any, NoReturn

from minisft.errors import UserError

CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"  # JSON's blanks: bytes.strip() alone would also take vertical tabs, which are errors
SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt")

SHORT = reprlib.Repr()  # plain repr() overflows the stack on the nesting that json.loads lets through
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlevel = 3


class BadRecord(Exception):  # noqa: N818  (raised to stop the run, or handed on to be counted)
    """A record that is no JSON object; `lines_down` is where in it, from its first line."""

    def __init__(self, reason: str, detail: str, lines_down: int = 0):
        super().__init__(reason)
        self.reason, self.detail, self.lines_down = reason, detail, lines_down


class Skip(Exception):  # noqa: N818  (not an error: it carries a record's reason to the one place that counts it)
    """What makes a record none that can be trained on; `value` is at fault."""

    def __init__(self, reason: str, value: Any):
        super().__init__(reason)
        self.reason, self.detail = reason, SHORT.repr(value)[:200]


def document(file: BufferedIOBase, source: str, format: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole file as one record of text; nothing where it is empty."""
    if format not in ("auto", "text"):
        raise UserError(f"{source}: a .txt file has no records of format {format!r} (remedy: --data.format text)")
    raw = file.read().removeprefix(BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise UserError(f"{source}:{line}: {_invalid_utf8(error)} (remedy: save the file as UTF-8)") from None
    if text:
        yield 1, {"text": text}


def records(file: BufferedIOBase, source: str, skip_bad: bool) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """(line, object), where the first byte that is not blank tells an array from JSON lines: names often lie."""
    file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
    start = file.tell()
    while (first := file.read(1)) and first in BLANK:
        pass
    file.seek(start)
    for line, raw in _array(file, source, start) if first == b"[" else _lines(file, source):
        try:
            yield line, _parse(raw)
        except BadRecord as bad:
            if not skip_bad:
                where = f"{source}:{line + bad.lines_down}: {bad.reason}: {bad.detail}"
                raise UserError(f"{where} (remedy: fix the line or pass --data.skip_bad true)") from None
            yield line, bad


def _lines(file: BufferedIOBase, source: str) -> Iterator[tuple[int, bytes]]:
    first = True
    for line, raw in enumerate(file, 1):  # a binary file splits on \n alone; str.splitlines would also on U+2028
        if not (record := raw.rstrip(BLANK)):
            continue
        if first and record.lstrip(BLANK) == b"{":
            raise UserError(
                f"{source}:{line}: one JSON object over several lines, where a file holds an array of records or one "
                "whole record a line (remedy: put [ and ] around it)"
            )
        first = False
        yield line, record


# A string (to its quote, or to the end of its line: a raw newline is an error, and the next line starts afresh) or a
# mark of structure. Group 1 is the string's end: without it the string goes on in the next chunk.
_TOKEN = re.compile(rb'"(?:[^"\\\n]++|\\.)*+(["\n])?|[\[\]{},]', re.DOTALL)


def _array(file: BufferedIOBase, source: str, offset: int) -> Iterator[tuple[int, bytes]]:
    """(line, bytes) of each record of a JSON array, found by counting brackets outside strings.

    Cutting first and decoding after keeps the memory at one record, gives byte offsets and lines without translation,
    and lets one bad record pass without losing the rest. `offset` is where `file` stands.
    """
    buffer, start, scan, depth, line, count = b"", 0, 0, -1, 1, 0  # depth 0: between the array's own brackets
    # Reading as much again as is pending makes a huge record cost its size a constant number of times, not squared.
    while chunk := file.read(max(CHUNK_BYTES, len(buffer) - start)):
        buffer, scan, start, offset = buffer[start:] + chunk, scan - start, 0, offset + start
        for token in _TOKEN.finditer(buffer, scan):
            mark, end = buffer[token.start()], token.end()
            if mark == ord('"'):
                if token[1] is None:
                    scan = token.start()
                    break
            elif mark in b"[{":
                depth += 1
                if depth == 0:
                    line, start = line + buffer.count(b"\n", 0, end), end
            elif depth > 0:
                depth -= mark in b"]}"
            elif mark in b",]":  # a stray } at depth 0 stays in its record, which then does not parse
                raw = buffer[start : end - 1].lstrip(BLANK)
                first = end - 1 - len(raw)
                if raw or count or mark == ord(","):  # [] has no record; [1,] lacks one
                    yield line + buffer.count(b"\n", start, first), raw
                    count += 1
                line, start = line + buffer.count(b"\n", start, end), end
                if mark == ord("]"):
                    return _nothing_after(file, buffer[end:], source, line)
            scan = end
    pending = buffer[start:].lstrip(BLANK)
    line, offset = line + buffer.count(b"\n", start, len(buffer) - len(pending)), offset + len(buffer) - len(pending)
    if depth == 0 and pending.rstrip(BLANK).endswith(b"}"):  # the last record is whole, only the array's end is missing
        yield line, pending
        pending, count, offset = b"", count + 1, offset + len(pending)
    inside = f"inside the record that starts at byte {offset}" if pending else f"at byte {offset}, without its ]"
    _refuse_cut_off(source, line, inside, count)


def _refuse_cut_off(source: str, line: int, inside: str, count: int) -> NoReturn:
    raise UserError(
        f"{source}:{line}: the JSON array is cut off: the file ends {inside}, after {count} complete records "
        f"(remedy: fetch the file again, or cut it after the last complete record and write ] there)"
    )


def _nothing_after(file: BufferedIOBase, rest: bytes, source: str, line: int) -> None:
    while not (text := rest.lstrip(BLANK)):
        line += rest.count(b"\n")
        if not (rest := file.read(CHUNK_BYTES)):
            return
    line += rest.count(b"\n", 0, len(rest) - len(text))
    raise UserError(f"{source}:{line}: text after the end of the JSON array (remedy: one array a file, or JSON lines)")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        record = _DECODER.decode(raw.decode("utf-8"))
        if b"\\u" in raw:  # only an escape can make half a surrogate pair, which no tokenizer could encode
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("invalid UTF-8", _invalid_utf8(error), raw.count(b"\n", 0, error.start)) from None
    except UnicodeEncodeError as error:
        raise BadRecord("bad JSON", f"lone surrogate {error.object[error.start]!a} in a string") from None
    except json.JSONDecodeError as error:
        raise BadRecord("bad JSON", f"{error.msg} at column {error.colno}", error.lineno - 1) from None
    except RecursionError:
        raise BadRecord("bad JSON", "nested too deep") from None
    except ValueError as error:  # NaN, Infinity; an integer of more than 4300 digits
        raise BadRecord("bad JSON", str(error).partition(";")[0]) from None
    if not isinstance(record, dict):
        raise BadRecord("bad JSON", f"a record must be an object, not {SHORT.repr(record)}")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would build one for each record


def _invalid_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason})"
