"""Files become JSON records: bytes in, (line, object) out, one record in memory at a time.

An array and JSON lines are told apart by their first byte. Both are cut into records first and decoded after, so that
every error has its file, line and byte, one bad record can pass without losing the rest, and an array of any size
streams. A record that is not JSON stops the run (or is handed on, with `skip_bad`); an array without its end always
stops it, because nobody knows what else is missing.
"""

import gzip
import json
import re
import reprlib
import shlex
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from minisft.errors import UserError
from minisft.files import regular_file

File = BufferedReader | gzip.GzipFile
CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"  # JSON's blanks: bytes.strip() alone would also take vertical tabs, which are errors
RECORD_BYTES = 1 << 28  # more is no record, but a file that unpacks to blanks, or one without its line breaks
SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt")

UTF16 = "iconv -f UTF-16 -t UTF-8 {0} > NEW{1}"
# What a file that is not what its name says begins with: what that is, and the remedy. {0}: the file, {1}: its suffix.
KINDS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull"),
    b"\xff\xfe\0\0": ("UTF-32", UTF16.replace("16", "32")),
    b"\xff\xfe": ("UTF-16", UTF16),
    b"\xfe\xff": ("UTF-16", UTF16),
    b"\0\0": ("zero bytes, which a copy that was cut off leaves behind", "fetch the file again"),
    b"\0{": ("UTF-16 without a byte-order mark", UTF16.replace("UTF-16", "UTF-16BE")),
    b"\0[": ("UTF-16 without a byte-order mark", UTF16.replace("UTF-16", "UTF-16BE")),
    b"PAR1": ("Parquet", "pandas.read_parquet('{0}').to_json('NEW.jsonl', orient='records', lines=True)"),
    b"ARROW1": ("Arrow", "pandas.read_feather('{0}').to_json('NEW.jsonl', orient='records', lines=True)"),
    b"PK\x03\x04": ("a zip archive", "unzip {0}, then name the file that was in it"),
    b"\x1f\x8b": ("gzip inside gzip", "gunzip it once"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "zstd -d {0}, then name the unpacked file"),
    b"\xfd7zXZ": ("packed by xz", "xz -dk {0}, then name the unpacked file"),
    b"BZh": ("packed by bzip2", "bzip2 -dk {0}, then name the unpacked file"),
    b"SQLite format 3": ("an SQLite database", "export its rows as JSON lines"),
    b"%PDF": ("a PDF", "convert it to text"),
    b"GGUF": ("the weights of a model", "name a file of conversations"),
    b"<": ("HTML or XML, often an error page saved in the file's place", "look at it, and fetch the file again"),
}

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


@contextmanager
def open_data(source: str, *, json_expected: bool) -> Iterator[File]:
    """The file's bytes, unpacked if they are gzip whatever its name is.

    Raises UserError if they are of another kind, or if it is `json_expected` and they do not begin like JSON.
    """
    regular_file(source)
    try:
        with open(source, "rb") as plain, _unpacked(plain) as file:
            head = file.read(600)
            file.seek(0)
            if kind := _other_kind(head, json_expected):
                remedy = kind[1].format(shlex.quote(source), Path(source).suffix)
                raise UserError(f"{source}: this is {kind[0]} (remedy: {remedy})")
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source}: damaged or cut-off gzip file: {error} (remedy: fetch the file again)") from error
    except PermissionError as error:
        raise UserError(f"{source}: {error.strerror} (remedy: name a file that can be read)") from error


def _unpacked(file: BufferedReader) -> AbstractContextManager[File]:
    return gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else nullcontext(file)


def _other_kind(head: bytes, json_expected: bool) -> tuple[str, str] | None:
    """What a file is that begins with `head`, and the remedy; None for one that can be read."""
    for first, kind in KINDS.items():
        if head.startswith(first) and (first != b"<" or json_expected):
            return kind
    if head[1:2] == b"\0":
        return "UTF-16 without a byte-order mark", UTF16.replace("UTF-16", "UTF-16LE")
    if head[257:262] == b"ustar":
        return "a tar archive", "tar -xf {0}, then name the file that was in it"
    text = head.removeprefix(BOM).lstrip(BLANK)
    if json_expected and text and text[:1] not in b"{[":
        return (f"no JSON: it begins {SHORT.repr(text[:40].decode('utf-8', 'replace'))}",
                "convert it to JSON lines; plain text belongs in a .txt file")
    return None


def document(file: File, source: str, format: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole file as one record of text; nothing where it is empty."""
    if format not in ("auto", "text"):
        raise UserError(f"{source}: a .txt file has no records of format {format!r} (remedy: --data.format text)")
    _refuse_large(raw := file.read(RECORD_BYTES + 1), source, 1)
    raw = raw.removeprefix(BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise UserError(f"{source}:{line}: {_invalid_utf8(error)} (remedy: save the file as UTF-8)") from None
    if text:
        yield 1, {"text": text}


def records(file: File, source: str, skip_bad: bool) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """(line, object), where the first byte that is not blank tells an array from JSON lines: names often lie."""
    file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
    start = 1 + _skip_blanks(file)
    for line, raw in (_array if file.peek(1)[:1] == b"[" else _lines)(file, source, start):
        try:
            yield line, _parse(raw)
        except BadRecord as bad:
            if not skip_bad:
                where = f"{source}:{line + bad.lines_down}: {bad.reason}: {bad.detail}"
                raise UserError(f"{where} (remedy: fix the line or pass --data.skip_bad true)") from None
            yield line, bad


def _skip_blanks(file: File) -> int:
    """Pass over blanks, a buffer at a time; the lines they end."""
    lines = 0
    while chunk := file.peek(1):
        blank = len(chunk) - len(chunk.lstrip(BLANK))
        lines += chunk.count(b"\n", 0, blank)
        file.read(blank)
        if blank < len(chunk):
            break
    return lines


def _refuse_large(raw: bytes, source: str, line: int) -> None:
    if len(raw) > RECORD_BYTES:
        raise UserError(f"{source}:{line}: a record of more than {RECORD_BYTES >> 20} MiB, which is no conversation "
                        "(remedy: look whether the file is what it should be; one record a line)")


def _lines(file: File, source: str, line: int) -> Iterator[tuple[int, bytes]]:
    first = True
    while raw := file.readline(RECORD_BYTES + 1):  # splits on \n alone; str.splitlines would also on U+2028
        _refuse_large(raw, source, line)
        if not (record := raw.rstrip(BLANK)):
            line += 1 + _skip_blanks(file)
            continue
        if first and (whole := _over_lines(file, record, raw, source, line)):
            yield line, whole
            return
        first = False
        yield line, record
        line += 1


def _over_lines(file: File, record: bytes, raw: bytes, source: str, line: int) -> bytes:
    """The whole file where it is one object written over several lines; nothing where it is not.

    Raises UserError where several such objects follow one another.
    """
    if _object_end(record) is not None:
        return b""
    place = file.tell()
    whole = raw + file.read(RECORD_BYTES)
    end = _object_end(whole)
    if end is None and record.lstrip(BLANK) != b"{":
        file.seek(place)
        return b""
    if end is None or whole[end:].strip(BLANK):
        raise UserError(f"{source}:{line}: JSON objects over several lines, where a file holds an array of records or "
                        "one whole record a line (remedy: jq -c . FILE > NEW.jsonl)")
    return whole


def _object_end(raw: bytes) -> int | None:
    """The bytes of the JSON value that `raw` begins with; None where it is not whole."""
    try:
        text = raw.decode("utf-8")
        start = len(text) - len(text.lstrip(" \t\r\n"))
        return len(text[: _DECODER.raw_decode(text, start)[1]].encode("utf-8"))
    except (ValueError, RecursionError):
        return None


# A string (to its quote, or to the end of its line: a raw newline is an error, and the next line starts afresh) or a
# mark of structure. Group 1 is the string's end: without it the string goes on in the next chunk.
_TOKEN = re.compile(rb'"(?:[^"\\\n]++|\\.)*+(["\n])?|[\[\]{},]', re.DOTALL)


def _array(file: File, source: str, line: int) -> Iterator[tuple[int, bytes]]:
    """(line, bytes) of each record of a JSON array, found by counting brackets outside strings.

    Cutting first keeps the memory at one record, gives byte offsets and lines, and lets one bad record pass without
    losing the rest. `file` stands at the array's [, in `line`.
    """
    offset, buffer, start, scan, depth, count = file.tell(), b"", 0, 0, -1, 0  # depth 0: between the array's brackets
    # As much again as is pending: a huge record costs its size a constant number of times, not squared.
    while chunk := file.read(max(CHUNK_BYTES, len(buffer) - start)):
        buffer, scan, start, offset = buffer[start:] + chunk, scan - start, 0, offset + start
        _refuse_large(buffer, source, line)  # at most one record is pending
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


def _nothing_after(file: File, rest: bytes, source: str, line: int) -> None:
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
