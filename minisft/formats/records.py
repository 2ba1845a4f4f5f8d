"""Files become JSON records: bytes in, (line, object) out, one record in memory at a time.

    bytes --cut--> (line, bytes of one record) --parse--> (line, dict | BadRecord)

The first byte tells an array from JSON lines. Both are cut into records first and parsed after, so every error has its
file and line, one bad record can be passed over without losing the rest, and an array of any size streams. A record
that is not JSON is handed on as a BadRecord; an array without its end stops the run, because nobody knows what else is
missing.
"""

import gzip
import json
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from minisft.errors import SHORT, UserError
from minisft.files import regular_file

File = BufferedReader | gzip.GzipFile
CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"  # JSON's blanks: bytes.strip() alone would also take vertical tabs, which are errors
RECORD_BYTES = 1 << 28  # more is not a record, but a file that unpacks to blanks, or one without its line breaks

ICONV = "iconv -f {encoding} -t UTF-8 {file} > NEW{suffix}"  # the encoding is the first word of the kind's name
# What a file of another kind begins with (a regular expression), what it is, and the remedy.
KINDS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull"),
    (rb"\xff\xfe\0\0", "UTF-32", ICONV),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", ICONV),
    (rb"\0\0", "zero bytes, as an interrupted copy leaves behind", "fetch the file again"),
    (rb"\0[{[]", "UTF-16BE without a byte-order mark", ICONV),
    (rb"[^\0]\0", "UTF-16LE without a byte-order mark", ICONV),
    (rb"PAR1", "Parquet", "name it so: mv {file} NEW.parquet"),
    (rb"ARROW1", "Arrow", "name it so: mv {file} NEW.arrow"),
    (rb"PK\x03\x04", "a zip archive", "unzip {file}, then name the file that was in it"),
    (rb".{257}ustar", "a tar archive", "tar -xf {file}, then name the file that was in it"),
    (rb"\x1f\x8b", "gzip inside gzip", "gunzip it once"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -d {file}, then name the unpacked file"),
    (rb"\xfd7zXZ", "compressed with xz", "xz -dk {file}, then name the unpacked file"),
    (rb"BZh", "compressed with bzip2", "bzip2 -dk {file}, then name the unpacked file"),
    (rb"SQLite format 3", "an SQLite database", "export its rows as JSON lines"),
    (rb"%PDF", "a PDF", "convert it to text"),
    (rb"GGUF", "the weights of a model", "name a file of conversations"),
)
NOT_JSON = (
    (rb"\s*<", "HTML or XML, often an error page saved under the file's name", "look at it, and fetch the file again"),
    (rb"(?:\xef\xbb\xbf)?+[ \t\r\n]*[^ \t\r\n{[]", "not JSON: it begins {begins}",
     "convert it to JSON lines; plain text belongs in a .txt file"),
)


@dataclass(frozen=True)
class BadRecord:
    """A record that is not a JSON object; the fault is `lines_down` below the record's first line."""

    reason: str
    detail: str
    lines_down: int = 0


Row = tuple[int, dict[str, Any] | BadRecord]  # with the line that it begins in


@contextmanager
def open_data(source: str, *, json_expected: bool, table: bool = False) -> Iterator[File]:
    """Open a file, unpacking it if its bytes are gzip, whatever its name. Raises UserError if it is of another kind
    (Parquet and Arrow are of another kind unless it is a `table`), or if it does not begin like JSON although that is
    `json_expected`."""
    regular_file(source)
    try:
        with open(source, "rb") as plain:
            file = gzip.GzipFile(fileobj=plain) if plain.peek(2)[:2] == b"\x1f\x8b" else plain
            head = file.read(600)
            for beginning, what, remedy in KINDS + NOT_JSON * json_expected:
                if re.match(beginning, head, re.DOTALL) and not (table and what in ("Parquet", "Arrow")):
                    begins = SHORT.repr(head.removeprefix(BOM).lstrip(BLANK)[:40].decode("utf-8", "replace"))
                    remedy = remedy.format(source=source, file=shlex.quote(source), suffix=Path(source).suffix,
                                           encoding=what.split()[0])
                    raise UserError(f"{source}: this is {what.format(begins=begins)} (remedy: {remedy})")
            file.seek(0)
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source}: damaged or cut-off gzip file: {error} (remedy: fetch the file again)") from error
    except PermissionError as error:
        raise UserError(f"{source}: {error.strerror} (remedy: name a file that can be read)") from error


def document(file: File, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole file as one record of text; no record if it is empty."""
    refuse_large(len(raw := file.read(RECORD_BYTES + 1)), source, 1)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{source}:{line}: {_invalid_utf8(error)} (remedy: save the file as UTF-8)") from None
    if text:
        yield 1, {"text": text}


def records(file: File, source: str, split: str = "") -> Iterator[Row]:
    """(line, object) of each record of an array or of JSON lines; the first byte tells which, because names often lie.
    `split` names the array, in a file that is one object with several."""
    file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
    start = 1 + _skip_blanks(file)
    if split:
        found = _array(file, source, _seek_split(file, source, split, start), inside=True)
    else:
        found = (_array if file.peek(1)[:1] == b"[" else _lines)(file, source, start)
    return ((line, _parse(raw)) for line, raw in found)


def _skip_blanks(file: File) -> int:
    """Skip blanks, a buffer at a time; the number of lines that end in them."""
    lines = 0
    while blank := len(chunk := file.peek(1)) - len(chunk.lstrip(BLANK)):
        lines += chunk.count(b"\n", 0, blank)
        file.read(blank)
    return lines


def refuse_large(size: int, source: str, line: int) -> None:
    """Raise UserError if a record of `size` bytes is too large to be one."""
    if size > RECORD_BYTES:
        raise UserError(f"{source}:{line}: a record of more than {RECORD_BYTES >> 20} MiB is not a conversation "
                        "(remedy: check that this is the right file; one record a line)")


def _lines(file: File, source: str, line: int) -> Iterator[tuple[int, bytes]]:
    """(line, bytes) of each line that is not blank, or of the whole file if it is one object over several lines."""
    start, first = file.tell(), file.readline(RECORD_BYTES + 1)
    refuse_large(len(first), source, line)
    if _after_value(first) is None:
        rest = _after_value(whole := first + file.read(RECORD_BYTES))
        if rest == "":
            yield line, whole
            return
        if rest or first.strip(BLANK) == b"{":
            raise UserError(f"{source}:{line}: JSON objects over several lines; a file holds an array of records or "
                            "one whole record a line (remedy: jq -c . FILE > NEW.jsonl)")
    file.seek(start)
    while raw := file.readline(RECORD_BYTES + 1):  # splits on \n alone; str.splitlines would also on U+2028
        refuse_large(len(raw), source, line)
        if record := raw.rstrip(BLANK):
            yield line, record
        else:
            line += _skip_blanks(file)
        line += 1


def _after_value(raw: bytes) -> str | None:
    """What follows the JSON value at the beginning of `raw`; None if that value is broken or not whole."""
    try:
        text = raw.decode("utf-8")
        return text[_DECODER.raw_decode(text)[1] :].strip(" \t\r\n")
    except (ValueError, RecursionError):
        return None


# A string (to its quote, or to the end of its line: a raw newline is an error, and the next line starts afresh) or a
# mark of structure. Group 1 is the string's end: without it the string continues in the next chunk.
_TOKEN = re.compile(rb'"(?:[^"\\\n]++|\\.)*+(["\n])?|[\[\]{},]', re.DOTALL)
_VALUE = re.compile(rb"[ \t\r\n]*+:[ \t\r\n]*+")  # what is between a name and its value


def _seek_split(file: File, source: str, split: str, line: int) -> int:
    """Move `file`, which stands in `line` at the beginning of one JSON object, to the [ of its array named `split`; the
    line of that. Raises UserError if there is no such array, or if the object is not whole."""
    start, depth, found = file.tell(), 0, dict[str, list[int]]()  # name -> where its values begin
    refuse_large(len(raw := file.read(RECORD_BYTES + 1)), source, line)
    for token in _TOKEN.finditer(raw):
        if raw[token.start()] in b"[]{}":
            depth += 1 if raw[token.start()] in b"[{" else -1
        elif depth == 1 and (value := _VALUE.match(raw, token.end())):
            with suppress(ValueError):
                found.setdefault(json.loads(token[0]), []).append(value.end())
    names = ", ".join(SHORT.repr(name) for name, [at, *_] in list(found.items())[:20] if raw[at : at + 1] == b"[")
    where, at = source.removesuffix(f"#{split}"), found.get(split, [])
    if raw[:1] != b"{" or depth:
        raise UserError(f"{where}:{line}: is not one whole JSON object, so it has no part {split!r} (remedy: name the "
                        f"file without #{split})")
    if len(at) != 1 or raw[at[0] : at[0] + 1] != b"[":
        problem = "several values" if len(at) > 1 else "no list of records"
        raise UserError(f"{where}:{line}: has {problem} named {split!r}; "
                        f"its lists are {names or 'none'} (remedy: name one of them, or the file without #{split})")
    file.seek(start + at[0])
    return line + raw.count(b"\n", 0, at[0])


def _array(file: File, source: str, line: int, inside: bool = False) -> Iterator[tuple[int, bytes]]:
    """(line, bytes) of each record of a JSON array, found by counting brackets outside strings. `file` stands at the
    array's [, in `line`; if it is `inside` an object, more may follow. The brackets are counted here because a parser
    that stops at a bad record, or at the end of a chunk, cannot tell where the next record begins."""
    file.read(1)
    buffer, scan, depth, count = b"", 0, 0, 0  # depth 0: between the array's brackets
    # As much again as is pending: a huge record costs its size a constant number of times, not squared.
    while chunk := file.read(max(CHUNK_BYTES, len(buffer))):
        buffer, start = buffer + chunk, 0
        refuse_large(len(buffer), source, line)  # at most one record is pending
        for token in _TOKEN.finditer(buffer, scan):
            mark, scan = buffer[token.start()], token.end()
            if mark == ord('"'):
                if token[1] is None:
                    scan = token.start()
                    break
            elif mark in b"[{":
                depth += 1
            elif depth:
                depth -= mark in b"]}"
            elif mark in b",]":  # a stray } at depth 0 stays in its record, which then does not parse
                raw = buffer[start : scan - 1].lstrip(BLANK)
                line += buffer.count(b"\n", start, scan - 1 - len(raw))
                if raw or count or mark == ord(","):  # [] has no record; [1,] lacks one
                    yield line, raw
                    count += 1
                line, start = line + raw.count(b"\n"), scan
                if mark == ord("]"):
                    if inside:
                        return
                    rest = buffer[scan:].lstrip(BLANK)
                    line += buffer.count(b"\n", scan, len(buffer) - len(rest)) + (0 if rest else _skip_blanks(file))
                    if rest or file.peek(1):
                        raise UserError(f"{source}:{line}: text after the end of the JSON array (remedy: one array a "
                                        "file, or JSON lines)")
                    return
        buffer, scan = buffer[start:], scan - start
    pending = buffer.lstrip(BLANK)
    line += buffer.count(b"\n", 0, len(buffer) - len(pending))
    if depth == 0 and pending.rstrip(BLANK).endswith(b"}"):  # the last record is whole, only the array's end is missing
        yield line, pending
        pending, count = b"", count + 1
    at = file.tell() - len(pending)
    where = f"inside the record that starts at byte {at}" if pending else f"at byte {at}, without its ]"
    raise UserError(f"{source}:{line}: the JSON array is cut off: the file ends {where}, after {count} complete "
                    "records (remedy: fetch the file again, or cut it after the last complete record and write ])")


def _parse(raw: bytes) -> dict[str, Any] | BadRecord:
    try:
        record = from_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord("invalid UTF-8", _invalid_utf8(error), raw.count(b"\n", 0, error.start))
    except UnicodeEncodeError as error:
        return BadRecord("bad JSON", f"lone surrogate {error.object[error.start]!a} in a string")
    except json.JSONDecodeError as error:
        return BadRecord("bad JSON", f"{error.msg} at column {error.colno}", error.lineno - 1)
    except RecursionError:
        return BadRecord("bad JSON", "nested too deep")
    except ValueError as error:  # NaN, Infinity; a key twice; an integer of more than 4300 digits
        return BadRecord("bad JSON", str(error).partition(";")[0])
    if not isinstance(record, dict):
        return BadRecord("bad JSON", f"a record must be an object, not {SHORT.repr(record)}")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):  # the first of two values would be gone without a word
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {SHORT.repr(twice)} stands twice in an object")
    return found


# json.loads would build one for each record.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_repetition)
WITH_NAN = json.JSONDecoder(object_pairs_hook=_without_repetition)  # json.dumps writes a table's gaps as NaN


def from_json(text: str, decoder: json.JSONDecoder = _DECODER) -> Any:
    """The value of JSON text. Raises ValueError or RecursionError if it is none, if a key stands twice in an object,
    for half of a surrogate pair, which no UTF-8 file could hold, and for NaN, unless the decoder is `WITH_NAN`."""
    found = decoder.decode(text)
    if "\\u" in text:  # only an escape can make half of a pair
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def _invalid_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason})"
