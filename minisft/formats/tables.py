"""Files of rows become records: CSV and TSV by the standard library, Parquet and Arrow by pyarrow (an extra).

The first row of a CSV file names its columns, and tells what separates them: the one of , ; and tab that it has (Excel
writes ; where , is the decimal mark). Every cell is text, and an empty one is null. A row of Parquet or Arrow is a
record like one of JSON; its "line" is its number from 1. Both kinds stream: memory holds a row of CSV, or a batch of
rows.
"""

import csv
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from minisft.errors import SHORT, UserError
from minisft.files import TABLES, TEXTS, file_and_split, is_data
from minisft.formats import records
from minisft.formats.records import BadRecord, File, Row

BATCH = 16  # rows of Parquet or Arrow in memory at a time: few, since a small file may repeat a huge value


def is_text(source: str) -> bool:
    """True for plain text, which is one document."""
    return source.lower().removesuffix(".gz").endswith(".txt")


@contextmanager
def rows(source: str, skip_bad: bool) -> Iterator[Iterator[Row]]:
    """Open a data file of any kind; (line, record) of each record. Raises UserError at once for a file of another kind;
    with `skip_bad`, one that does not begin like JSON has bad records instead."""
    file, split = file_and_split(source)
    name = file.lower().removesuffix(".gz")
    is_csv, is_table = name.endswith((".csv", ".tsv")), name.endswith(TABLES)
    is_json = not (is_csv or is_table or is_text(file))
    with records.open_data(file, json_expected=is_json and not skip_bad, table=is_table) as opened:
        if not is_data(file):
            raise UserError(f"{file}: unknown kind of file (known: {', '.join(TEXTS)}, and .gz of each; "
                            f"{', '.join(TABLES)}; remedy: rename the file if it is JSON, or else convert it to JSON "
                            "lines)")
        if is_table:
            yield _arrow(file)
        elif is_text(file):
            yield iter(records.document(opened, file))
        elif is_csv:
            yield _cells(opened, file, "\t" if name.endswith(".tsv") else "")
        else:
            yield records.records(opened, source, split)


def _cells(file: File, source: str, delimiter: str) -> Iterator[Row]:
    """(line, row) of each row below the header; a row of another length is a BadRecord. Without a `delimiter` the
    header tells it."""
    csv.field_size_limit(records.RECORD_BYTES)  # of the whole process; a row is bounded below
    line, size = 0, 0  # lines read, and the bytes of the row that is being read

    def lines() -> Iterator[str]:
        nonlocal line, size
        while raw := file.readline(records.RECORD_BYTES + 1):
            line, size = line + 1, size + len(raw)
            records.refuse_large(size, source, line)
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8", "surrogateescape")

    text = lines()
    head = next((one for one in text if one.strip()), "")
    if said := re.fullmatch(r"sep=(.)\s*", head):  # a line of Excel's own
        delimiter, head = said[1], next(text, "")
    found = [mark for mark in ",;\t" if mark in re.sub(r'"[^"]*+"?', "", head)]
    if len(found) > 1 and not delimiter:
        raise UserError(f"{source}:{line}: the header has {' and '.join(map(repr, found))} outside of quotes, so it "
                        "does not tell what separates the columns (remedy: quote the names of columns that have one)")
    parser = csv.reader(chain([head], text), delimiter=delimiter or (found or ",")[0], strict=True)
    names: list[str] = []
    while True:
        start, size = line + bool(names), 0
        try:
            row = next(parser)
            "".join(row).encode("utf-8")
        except StopIteration:
            return
        except csv.Error as error:
            if "new-line" in str(error) and not names:
                raise UserError(f"{source}:{start}: lines end in \\r alone (remedy: tr '\\r' '\\n' < "
                                f"{shlex.quote(source)} > NEW.csv)") from None
            if "end of data" in str(error) or not names:  # nobody knows how many rows the open quote has swallowed
                raise UserError(f'{source}:{start}: {error}, in lines {start} to {line} (remedy: look for a quote that '
                                'is not closed; inside quotes, " is written "")') from None
            yield start, BadRecord("bad row", f'{error}, in lines {start} to {line}; inside quotes, " is written ""')
            continue
        except UnicodeEncodeError as error:
            problem = BadRecord("invalid UTF-8", f"byte 0x{ord(error.object[error.start]) - 0xDC00:02x}; Turkish from "
                                f"Excel: iconv -f WINDOWS-1254 -t UTF-8 {shlex.quote(source)} > NEW.csv")
            if not names:
                raise UserError(f"{source}:{start}: {problem.reason}: {problem.detail}") from None
            yield start, problem
            continue
        if not names:
            names = [name if name.strip() else f"column {i}" for i, name in enumerate(row, 1)]
            if twice := sorted(name for name, count in Counter(names).items() if count > 1):
                raise UserError(f"{source}:{start}: several columns are named {', '.join(map(SHORT.repr, twice))} "
                                "(remedy: give each its own name in the header)")
        elif row and len(row) != len(names):
            yield start, BadRecord("bad row", f"{len(row)} cells, and the header names {len(names)} columns")
        elif row:
            yield start, {name: cell or None for name, cell in zip(names, row, strict=True)}


def _arrow(source: str) -> Iterator[Row]:
    """(number, row) of each row of a Parquet or Feather file, or of an Arrow stream, as `datasets` writes them."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise UserError(f"{source}: a table of Parquet or Arrow needs pyarrow (remedy: pip install 'minisft[parquet]'; "
                        f"or, where pandas is, pandas.read_{'parquet' if source.endswith('parquet') else 'feather'}"
                        f"({source!r}).to_json('NEW.jsonl', orient='records', lines=True))") from None
    try:
        with open(source, "rb") as file:
            magic = file.read(6)
        if magic[:4] == b"PAR1":
            table = parquet.ParquetFile(source)
            schema, batches = table.schema_arrow, table.iter_batches(BATCH)
        elif magic == b"ARROW1":
            opened = ipc.open_file(pyarrow.memory_map(source))
            schema, batches = opened.schema, map(opened.get_batch, range(opened.num_record_batches))
        else:
            batches = ipc.open_stream(pyarrow.memory_map(source))
            schema = batches.schema
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(source, error) from None
    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"{source}: several of its columns have one name: {', '.join(map(SHORT.repr, schema.names))} "
                        "(remedy: give each its own)")

    def numbered() -> Iterator[Row]:
        number = 1
        try:
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH):
                    records.refuse_large((part := batch.slice(start, BATCH)).nbytes, source, number)
                    for row in part.to_pylist():
                        yield number, row
                        number += 1
        except UserError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, LookupError) as error:  # also odd dates
            raise _damaged(source, error) from None

    return numbered()


def _damaged(source: str, error: Exception) -> UserError:
    reason = SHORT.repr(str(error))
    return UserError(f"{source}: pyarrow cannot read this: {reason} (remedy: fetch the file again, or convert it to "
                     "JSON lines)")
