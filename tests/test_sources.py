"""Data as people have it: columns of any name, tables, folders and globs, parts of one JSON object, long texts.

The oracles: the same records under a format's own names as JSON lines, csv.writer, json.load, pyarrow's writer, and the
ids of the whole text.
"""

import csv
import functools
import gzip
import hashlib
import io
import json
import math
import shlex
import shutil
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracles.tiny_llama import write_tiny_llama
from small_data import store_of
from test_fields import RECORDS

from minisft.__main__ import main
from minisft.config import DataConfig
from minisft.config_io import load, to_toml
from minisft.data import checks
from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation, Skipped
from minisft.data.dataset import Dataset
from minisft.data.store import LAYOUT, DamagedError
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.formats import tables
from minisft.formats.parse import read

TURKISH = {"instruction": "talimat", "input": "giriş", "output": "çıktı"}
PAIR = {"prompt": "a", "completion": "b"}
fuzz = settings(database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    return Renderer(load_templates()["llama3"], Tokenizer(write_tiny_llama(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture
def opened(tmp_path, renderer):
    return lambda path, **options: store_of(path, renderer, tmp_path / "cache", **options)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a tokenizer, and a function that runs `minisft prepare` there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    write_tiny_llama(tmp_path / "model")

    def prepare(*argv):
        return main(["prepare", "--model.path", "model", "--data.template", "llama3", "--data.cache", "cache", *argv])

    return prepare


def talks(path, **options):
    """The turns of every conversation, and the reason of every skipped record."""
    return [found.reason if isinstance(found, Skipped) else found.turns for found in read(path, **options)]


def refused(path, **options):
    with pytest.raises(UserError) as error:
        list(read(path, **options))
    return str(error.value)


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", RECORDS)
@pytest.mark.parametrize("named", ["auto", "own"])
def test_mapped_columns_give_what_the_formats_own_names_give(write, format, named):
    record = RECORDS[format]
    options = {} if named == "auto" else {"format": {"conversational": "prompt_completion"}.get(format, format)}
    expected = talks(write([record]), **options)
    columns = {name: f"Sütun ğ {i}" for i, name in enumerate(record)}
    for change in (str, lambda name: f" {name}\t", lambda name: unicodedata.normalize("NFD", name)):
        renamed = write([{change(columns[name]): value for name, value in record.items()}] * 2)
        assert talks(renamed, columns=columns.items(), **options) == expected * 2
        decomposed = {field: unicodedata.normalize("NFD", f"{name} ") for field, name in columns.items()}
        assert talks(renamed, columns=decomposed.items(), **options) == expected * 2


def test_other_columns_are_counted_and_displaced_ones_too(write):
    path, unread = write([{"talimat": "a", " çıktı": "b", "output": "c", "kaynak": "d"}]), {}
    columns = {"instruction": "talimat", "output": "çıktı"}
    (found,) = read(path, columns=columns.items(), unread=unread)
    assert [turn.content for turn in found.turns] == ["a", "b"]
    assert unread == {"'output (displaced)'": 1, "kaynak": 1}
    swapped = write([{"input": "question", "output": "answer"}])
    columns = {"instruction": "output", "output": "input"}
    assert [turn.content for turn in talks(swapped, columns=columns.items())[0]] == ["answer", "question"]


def test_a_column_that_no_record_has_is_an_error_with_the_nearest_first(write):
    rows = [{"no": 1, "talimat": "a", " giriş": None, " çıktı": "b"}, {"talimat": "c", " çıktı": "d", "ek": "e"}]
    wrong = TURKISH | {"input": "girs"}
    for options in ({}, {"format": "alpaca"}):
        message = refused(write(rows), columns=wrong.items(), **options)
        assert "data.fields says that input is the column 'girs', which no record so far has; the " \
               "columns are ' giriş', " in message
        assert message.endswith("(remedy: name one of these, or give this source fields of its own)")
        assert "'ek'" in message
    assert [len(turns) for turns in talks(write(rows), columns=TURKISH.items())] == [2, 2]
    message = refused(write(rows), columns=(TURKISH | {"instruction": "talimt"}).items())  # no format, for that reason
    assert ":1: data.fields says that instruction is the column 'talimt', which no record so far has; the " \
           "columns are 'talimat', " in message
    message = refused(write(rows), columns=(TURKISH | {"response": "ek"}).items())
    assert "data.fields: format alpaca reads no field response (remedy: map a column to one of context, " in message
    assert talks(write("plain", "a.txt"), columns=TURKISH.items(), format="text")[0][0].content == "plain"


def test_the_mapping_of_a_source_comes_before_the_default_and_survives_toml(tmp_path):
    table = '{instruction = "talimat", input = "giriş", output = "a \\"b\\" \' #"}'
    config = load(["--model.path", "m", "--data.fields", table,
                   "--data.train", '["a.csv", {path = "b.csv", fields = {text = "metin", "x y" = "z"}}]'])
    expected = (("instruction", "talimat"), ("input", "giriş"), ("output", "a \"b\" ' #"))
    assert (config.data.fields, config.data.train[0].fields) == (expected, expected)
    assert config.data.train[1].fields == (("text", "metin"), ("x y", "z"))
    (tmp_path / "r.toml").write_text(to_toml(config), encoding="utf-8")
    assert load([str(tmp_path / "r.toml")]) == config
    again = load([str(tmp_path / "r.toml"), "--data.fields", '{text = "t"}'])  # reaches the one that inherited it
    assert [source.fields for source in again.data.train] == [(("text", "t"),), config.data.train[1].fields]
    for wrong in ("instruction=talimat", "[1]", "{a = 1}", '{a = ""}', '{a = "\\u0007"}', '{a = {b = "c"}}'):
        with pytest.raises(UserError, match=r'--data\.fields: expected \{field = "column", \.\.\.\}, got '):
            load(["--model.path", "m", "--data.train", "a", "--data.fields", wrong])


def test_the_mapping_is_part_of_a_stores_key_and_without_one_the_key_is_the_old_one(opened, write, renderer):
    path = write([{"prompt": "a", "completion": "b", "başka": "c"}])
    old = [LAYOUT, hashlib.sha256(path.read_bytes()).hexdigest(), "data", str(path), "auto", False, 100, "all", [],
           renderer.fingerprint()]
    plain = opened(path)
    assert plain.key == hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()[:32]
    mapped = opened(path, fields=(("completion", "başka"),))
    assert mapped.key != plain.key
    assert mapped.hashes[0] != plain.hashes[0]
    assert opened(path, fields=(("completion", "başka"),)).key == mapped.key


@pytest.mark.parametrize(("record", "table"), [
    ({"metin": "a"}, '{text = "metin"}'),
    ({"input": "a", "output": "b"}, '{instruction = "input", output = "output"}'),
    ({"çıktı ": "c", "talimat": "a", " giriş": "b"}, '{instruction = "talimat", input = " giriş", output = "çıktı "}'),
    ({"id": "1", "answer": "b", "question": "a"}, '{instruction = "question", output = "answer"}'),
    ({"question": "a", "answer": "b", "yanıt": "c"}, '{instruction = "QUESTION", output = "ANSWER"}'),
    ({"x": "a", "y": "b"}, '{instruction = "QUESTION", output = "ANSWER"}'),
    ({"id": "x", "dialog": [{"role": "user", "content": "a"}]}, '{messages = "dialog"}'),
    ({"a": "1", "b": "2", "c": "3", "d": "4"}, '{instruction = "QUESTION", output = "ANSWER"}'),
])
def test_the_error_for_an_unknown_format_suggests_a_mapping_that_works(write, here, capsys, record, table):
    path = write([record])
    message = refused(path)
    option, found = shlex.split(message[message.index("--data.fields") :].removesuffix(")"))
    assert (option, found) == ("--data.fields", table)
    if "QUESTION" not in table:
        assert load(["--model.path", "m", "--data.train", str(path), option, found]).data.train[0].fields
        columns = load(["--model.path", "m", "--data.train", str(path), option, found]).data.fields
        assert len(list(read(path, columns=columns))) == 1


@pytest.mark.parametrize("turn", [
    {"role": "user", "content": "Hi"}, {"from": "human", "value": "Hi"}, {"text": "Hi", "role": "user"},
    {"message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter", "deleted": False, "message_tree_id": "1"}])
def test_the_error_for_turns_without_a_conversation_suggests_none_of_their_columns(write, here, turn):
    message = refused(write([turn]))
    assert 'this is one turn; write the turns of each conversation into one record, as in {"messages": [{' in message
    assert "--data.fields" not in message
    if "text" in turn:  # it was taken for a plain text, trained as a whole
        assert "if role is no speaker, --data.ignore role)" in message
        [found] = read(write([turn]), ignore=["role"])
        assert [each.role for each in found.turns] == ["text"]


@pytest.mark.parametrize(("options", "path", "message", "table"), [
    (["--data.format", "messages"], "t.txt", "t.txt: a .txt file has no records of format 'messages' (remedy: "
     '--data.format text, or format = "text" in the table of this source)', 'format = "text"'),
    (["--data.fields", '{messages = "dialog"}'], "t.jsonl", "data.fields: format text reads no field messages (remedy: "
     'map a column to one of text; if the columns are those of other sources, put fields = {text = "text"} in the '
     "table of this one)", 'fields = {text = "text"}')])
def test_a_source_of_another_format_beside_those_is_told_how_to_say_so(write, here, capsys, options, path, message,
                                                                       table):
    write([{"dialog" if "{" in options[1] else "messages": [{"role": "user", "content": "a"},
                                                          {"role": "assistant", "content": "b"}]}], "chats.jsonl")
    write([{"text": "hello there"}], "t.jsonl")
    Path("t.txt").write_text("hello there")
    run = functools.partial(here, "--data.train", "chats.jsonl", "--batch.packs", "1", *options, "--data.replay")
    assert run(path) == 2
    assert message in capsys.readouterr().err
    assert run(f'[{{path = "{path}", {table}}}]') == 0


# ---- CSV and TSV -----------------------------------------------------------------------------------------------------

cells = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=8) | st.sampled_from(
    ['"', '""', ",", ";", "\t", "\n", 'a "b"\n;c', "İĞŞ", "\u2028", "null"])


@given(rows=st.lists(st.tuples(cells, cells), max_size=8), mark=st.sampled_from(",;\t"), bom=st.booleans(),
       end=st.sampled_from(["\n", "\r\n"]), quoted=st.booleans(), name=st.sampled_from(["a.csv", "a.csv.gz"]))
@fuzz
def test_a_table_gives_what_csv_writer_was_given_as_json_lines_would(write, rows, mark, bom, end, quoted, name):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=mark, lineterminator=end,
                        quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
    writer.writerow(PAIR)
    starts = []
    for row in rows:
        starts.append(1 + buffer.getvalue().count("\n"))
        writer.writerow(row)
    content = b"\xef\xbb\xbf" * bom + buffer.getvalue().encode()
    path = write(gzip.compress(content) if name.endswith("gz") else content, name)
    records = [{"prompt": one or None, "completion": other or None} for one, other in rows]
    with tables.rows(str(path), skip_bad=False) as found:
        assert list(found) == list(zip(starts, records, strict=True))
    options = {"format": "prompt_completion"}
    assert talks(path, **options) == talks(write(records), **options)


@pytest.mark.parametrize(("header", "name"), [
    ("prompt;completion", "a.csv"), ('prompt;"completion"', "a.CSV"), ("sep=;\r\nprompt;completion", "a.csv"),
    ("\n\nprompt;completion", "a.csv"), ('prompt;completion;"a,b"', "a.csv"), ('"a,b";prompt;completion', "b.csv")])
def test_the_header_line_tells_what_separates_the_columns(write, header, name):
    row = "q;" * (name == "b.csv") + '"x;1, y";z' + ";q" * header.endswith('b"')
    assert [turn.content for turn in talks(write(f"{header}\r\n{row}\r\n", name))[0]] == ["x;1, y", "z"]


def test_a_header_that_does_not_tell_or_names_a_column_twice_is_refused(write):
    message = refused(write("prompt, or question;completion\na;b\n", "a.csv"))
    assert message.endswith("a.csv:1: the header has ',' and ';' outside of quotes, so it does not tell what separates "
                            "the columns (remedy: quote the names of columns that have one)")
    path = write("prompt,prompt\na,b", "a.csv")
    assert "a.csv:1: several columns are named 'prompt' (remedy: give each" in refused(path)
    unread = {}
    assert len(list(read(write(",prompt,completion\n0,a,b\n", "a.csv"), unread=unread))) == 1  # the index of pandas
    assert unread == {"'column 1'": 1}
    assert len(talks(write("text\na, b; c\n", "a.csv"), skip_bad=True)) == 1  # one column: a comma is the rule


def test_bad_rows_have_their_line_and_are_counted(write, opened):
    path = write('prompt,completion\na,"b\nc"\nd\ne,f,g\n\nh,i"j\nk,"l"m\n,\nn,o\n', "a.csv")
    assert refused(path).endswith("a.csv:4: bad row: 1 cells, and the header names 2 columns "
                                  "(remedy: fix the line or pass --data.skip_bad true)")
    found = list(read(path, skip_bad=True))
    assert [(f.line, getattr(f, "reason", "")) for f in found] == [
        (2, ""), (4, "bad row"), (5, "bad row"), (7, ""), (8, "bad row"), (9, "blank turn"), (10, "")]
    assert found[3].turns[1].content == 'i"j'
    assert "in lines 8 to 8; inside quotes" in found[4].detail
    with pytest.raises(UserError, match=r"more than data\.max_bad = 2 broken records; the first: "):
        opened(path, skip_bad=True, max_bad=2)
    assert opened(path, skip_bad=True, max_bad=3).report.skipped == {"bad row": 3, "blank turn": 1}
    old_mac = write("prompt,completion\ra,b\r", "m.csv")
    assert f"m.csv:1: lines end in \\r alone (remedy: tr '\\r' '\\n' < {old_mac} > NEW.csv)" in refused(old_mac)
    open_quote = write('prompt,completion\na,b\nc,"d\ne,f\n', "a.csv")
    assert 'a.csv:3: unexpected end of data, in lines 3 to 4 (remedy: look for a quote that is not closed; inside ' \
           'quotes, " is written "")' in refused(open_quote, skip_bad=True)


def test_an_encoding_that_is_not_utf8_is_named(write):
    path = write("talimat;çıktı\nşu;bu\n".encode("cp1254"), "a.csv")
    assert "a.csv:1: invalid UTF-8: byte 0xe7; Turkish from Excel: iconv -f WINDOWS-1254 -t UTF-8 " in refused(path)
    path = write(b"prompt,completion\na,b\nc,d\xfe\n", "a.csv")
    assert "a.csv:3: invalid UTF-8: byte 0xfe; " in refused(path)
    assert [getattr(f, "reason", "") for f in read(path, skip_bad=True)] == ["", "invalid UTF-8"]


def test_large_cells_are_read_and_a_cell_without_end_is_refused(write, monkeypatch):
    long = "x" * (1 << 18)  # more than the csv module takes by itself
    assert talks(write(f'prompt,completion\na,"{long}"\n', "a.csv"))[0][1].content == long
    monkeypatch.setattr(tables.records, "RECORD_BYTES", 1000)
    assert "is not a conversation" in refused(write('prompt,completion\na,"' + "x\n" * 600, "a.csv"))
    assert len(talks(write("prompt,completion\n" + "aaaa,bbbb\n" * 600, "a.csv"))) == 600  # each row by itself


@given(content=st.binary(max_size=60) | st.lists(st.sampled_from(
    [b"text", b"prompt,completion\n", b"a;b", b'"', b",", b";", b"\n", b"\r", b"\t", b"\xef\xbb\xbf", b"\xff", b"\0",
     b"sep=", "ğ".encode()]), max_size=30).map(b"".join), skip_bad=st.booleans(),
       name=st.sampled_from(["a.csv", "a.tsv", "a.csv.gz", "a.parquet", "a.arrow"]))
@example(b"", True, "a.csv")
@fuzz
def test_any_bytes_as_a_table(write, content, skip_bad, name):
    problem = f"{name}:"
    try:
        for found in read(write(content, name), skip_bad=skip_bad):
            assert isinstance(found, Conversation | Skipped)
    except UserError as error:
        problem = str(error)
    assert f"{name}:" in problem


# ---- Parquet and Arrow -----------------------------------------------------------------------------------------------

ROWS = [
    {"id": i, "messages": [{"role": "user", "content": f"soru {i}", "weight": None},
                           {"role": "assistant", "content": None if i == 3 else "cevap", "weight": i % 2}],
     "system": None if i % 3 else "Kısa."} for i in range(700)]


def written(path, rows=ROWS):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=300)
    elif path.suffix == ".feather":
        feather.write_feather(table, str(path))
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=400)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.arrow"])
def test_parquet_and_arrow_give_what_json_lines_give(write, tmp_path, name):
    def found(path):
        unread = {}
        return [(f.line, f.reason if isinstance(f, Skipped) else f.turns) for f in read(path, unread=unread)], unread

    expected = found(write(ROWS))
    assert found(written(tmp_path / name)) == expected
    assert [line for line, _ in expected[0]] == list(range(1, 701))
    assert expected[0][3][1] == "no answer"


def test_a_damaged_table_a_column_twice_and_another_kind_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    path = written(tmp_path / "a.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert "a.parquet: pyarrow cannot read this: " in refused(path)
    path.write_bytes(whole[:300] + bytes(200) + whole[500:])
    assert "a.parquet: pyarrow cannot read this: " in refused(path)
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(twice, path)
    assert "several of its columns have one name: 'text', 'text' (remedy: give" in refused(path)
    path.write_bytes(b"version https://git-lfs")
    assert "a.parquet: this is a Git LFS pointer" in refused(path)
    arrow = written(tmp_path / "b.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-2000])
    assert "b.arrow: pyarrow cannot read this" in refused(arrow)


def test_values_that_json_lacks_are_counted_or_refused_but_never_a_traceback(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    path = tmp_path / "a.parquet"
    for values in (pa.array([10**18 + 1], pa.timestamp("ns")), pa.array([2**60], pa.timestamp("ms")),
                   pa.array([b"\xff"]), pa.array([float("nan")]),
                   pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), pa.array([3], pa.decimal128(5, 2)),
                   pa.array([0], pa.timestamp("s", "Nowhere/None"))):
        for table in (pa.table({"text": ["a"], "other": values}), pa.table({"text": values})):
            parquet.write_table(table, path)
            unread, problem = {}, "a.parquet: pyarrow cannot read this: "
            try:
                [found] = read(path, unread=unread)
                assert unread == {"other": 1} or found.reason == "content is not text"
            except UserError as error:
                problem = str(error)
            assert "a.parquet: pyarrow cannot read this: " in problem


def test_names_from_a_file_or_a_folder_do_not_steer_the_terminal(write, tmp_path):
    for path in (write(json.dumps({"\x1b[2J": [{"a": 1}]}), "a.json"),
                 write([{"\x1b[2J": [{"role": "user", "content": "a"}]}]), write([{"\x1b[2J": "a", "\x9b": "b"}])):
        assert not {"\x1b", "\x9b"} & set(refused(path))
        assert not {"\x1b", "\x9b"} & set(refused(path, columns=[("text", "x")]))
    write("", "d/\x1b[2J")
    assert "\x1b" not in refused(tmp_path / "d")


def test_a_small_file_that_repeats_a_huge_value_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "a.parquet", [{"text": "x" * 10_000}] * 5000)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(tables.records, "RECORD_BYTES", 100_000)
    assert "a.parquet:1: a record of more than 0 MiB is not a conversation" in refused(path)


def test_without_pyarrow_the_extra_and_the_conversion_are_named(tmp_path, monkeypatch):
    path = tmp_path / "it's.parquet"
    path.write_bytes(b"PAR1" + bytes(20))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(path) == (
        f"{path}: a table of Parquet or Arrow needs pyarrow (remedy: pip install 'minisft[parquet]'; or, where pandas "
        f"is, pandas.read_parquet({str(path)!r}).to_json('NEW.jsonl', orient='records', lines=True))")


# ---- folders, globs, parts of an object ------------------------------------------------------------------------------


def test_a_folder_and_a_glob_are_one_source_of_all_their_files_in_order(write, opened, tmp_path):
    for name, answers in (("d/b.jsonl", "xy"), ("d/a.csv", "z"), ("d/c.json.gz", "w")):
        records = [{"prompt": "q", "completion": answer} for answer in answers]
        table = "prompt,completion\n" + "".join(f"q,{answer}\n" for answer in answers)
        packed = gzip.compress(json.dumps(records).encode())
        write(table if "csv" in name else packed if "gz" in name else records, name)
    write("not data", "d/README.md")
    write("not data", "d/.hidden.jsonl")
    (tmp_path / "d" / "inner.jsonl").mkdir()
    folder = tmp_path / "d"
    files = [str(folder / name) for name in ("a.csv", "b.jsonl", "c.json.gz")]
    for path in (folder, f"{folder}/*.*[vlz]"):
        store = opened(path)
        assert store.report.files == files
        dataset = Dataset([store], DataConfig())
        assert [dataset.origin(i) for i in range(4)] == [(files[0], 2), (files[1], 1), (files[1], 2), (files[2], 1)]
    before = opened(folder)
    assert before.key == opened(folder).key
    write([PAIR], "d/d.jsonl")
    after = opened(folder)
    assert (after.key != before.key, len(after)) == (True, 5)
    (folder / "d.jsonl").rename(folder / "e.jsonl")  # the same bytes in the same order
    assert opened(folder).origin(4) == (str(folder / "e.jsonl"), 1)
    config = load(["--model.path", "m", "--data.train", "data/,x/part-*.jsonl,y/*.csv,z/**/*.json,/*.csv"])
    assert [source.name for source in config.data.train] == ["data", "part", "y", "z", "data-2"]


def test_what_a_folder_or_a_glob_lacks_or_has_twice_is_named(write, tmp_path):
    write("", "d/README.md")
    assert f"{tmp_path}/d: names no data file; there are README.md (remedy: name a file, a folder or a glob of " \
        in refused(tmp_path / "d")
    assert "d/*.jsonl: names no data file; there are README.md" in refused(tmp_path / "d" / "*.jsonl")
    assert "nowhere/*.jsonl: names no data file; there are none" in refused(tmp_path / "nowhere" / "*.jsonl")
    write([PAIR], "d/a.jsonl")
    write(gzip.compress(b"{}"), "d/a.jsonl.gz")
    assert "a.jsonl and " in (message := refused(tmp_path / "d"))
    assert message.endswith("a.jsonl.gz, the same data twice by their names (remedy: name one of them, or a glob that "
                            "matches one)")
    (tmp_path / "d" / "a.jsonl.gz").unlink()
    (tmp_path / "d" / "b.jsonl").symlink_to("gone")
    assert "b.jsonl: No such file or directory" in refused(tmp_path / "d")
    (tmp_path / "d" / "b.jsonl").unlink()
    write([{"text": "a"}], "d/b.jsonl")
    assert "b.jsonl:1: is of format text, and the files before it in " in (message := refused(tmp_path / "d"))
    assert message.endswith("of prompt_completion (remedy: name them as two sources)")
    write([PAIR], "[d]/a*.jsonl")  # a file of that very name
    assert len(talks(tmp_path / "[d]" / "a*.jsonl")) == 1


def test_an_output_never_overwrites_a_file_of_a_folder_or_a_glob(write, here, capsys):
    write([PAIR] * 3, "d/a.jsonl")
    for path in ("d", "d/*.jsonl"):
        assert here("--data.train", path, "--dump", "d/a.jsonl", "--batch.packs", "1") == 2
        assert "this command reads that file and would overwrite it" in capsys.readouterr().err
    assert here("--data.train", "d/*.jsonl", "--batch.packs", "1") == 0
    assert "files: 1 (d/a.jsonl)" in capsys.readouterr().out


junk = st.recursive(st.none() | st.integers() | st.text('ab"\\[]{},:#\n', max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.text('a"[', max_size=3), inner, max_size=3), max_leaves=8)


@given(parts=st.dictionaries(st.sampled_from(["train", "test", "a b", "çöp", 'q"]']), st.lists(st.dictionaries(
    st.just("x"), junk), max_size=4), min_size=1), rest=st.dictionaries(st.text('xy[', min_size=1), junk, max_size=3),
    indent=st.sampled_from([None, 1]), packed=st.booleans())
@fuzz
def test_a_part_of_an_object_is_what_json_load_has_there(write, parts, rest, indent, packed):
    records = {name: [{"prompt": "a", "completion": f"b{i}", "extra": one} for i, one in enumerate(part)]
               for name, part in parts.items()}
    content = "\n" * bool(indent) + json.dumps(rest | records, indent=indent)
    path = write(gzip.compress(content.encode()) if packed else content, "a.json")
    lines = content.split("\n")
    for name in records:
        found = list(read(f"{path}#{name}"))
        assert [f.turns[1].content for f in found] == [record["completion"] for record in records[name]]
        if indent:  # each record begins where its { stands
            assert all(lines[f.line - 1].strip() == "{" for f in found)
        assert all(f.source == f"{path}#{name}" for f in found)


def test_parts_that_are_not_there_are_refused_with_those_that_are(write, opened):
    path = write('{"n": 3, "train": [{"text": "a"}], "çöp": [], "x": {"dev": []}}', "a.json")
    assert refused(f"{path}#dev") == (f"{path}:1: has no list of records named 'dev'; its lists are 'train', 'çöp' "
                                      "(remedy: name one of them, or the file without #dev)")
    assert "has no list of records named 'n'; its lists" in refused(f"{path}#n")
    assert len(talks(f"{path}#train")) == 1
    assert opened(f"{path}#train").report.path == f"{path}#train"
    assert "has several values named 'a'" in refused(str(write('{"a": [], "a": []}', "b.json")) + "#a")
    for content in ('[{"text": "a"}]', '{"train": [{"text": "a"}]', '{"train": [{"text": "a"'):
        assert refused(str(write(content, "c.json")) + "#train").endswith(
            "c.json:1: is not one whole JSON object, so it has no part 'train' (remedy: name the file without #train)")
    for name in ("a.json", "b.json"):
        write('{"train": [{"text": "a"}]}', f"d/{name}")
    assert len(talks(path.parent / "d" / "*.json#train")) == 2
    names = [source.name for source in load(["--model.path", "m", "--data.train", "a.json#train,a.json#test,C#.jsonl"]
                                            ).data.train]
    assert names == ["a-train", "a-test", "C#"]


# ---- texts longer than a pack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [3, 4, 7, 16])
def test_the_parts_of_a_text_are_the_text_without_loss_or_repetition(opened, write, seq_len):
    texts = ["x y " * n for n in range(1, 12)]
    store = opened(write([{"text": text} for text in texts]))
    dataset = Dataset([store], DataConfig(seq_len=seq_len, overlong="split"))
    found, lost = {}, 0
    for i in range(len(dataset)):
        ids, mask = dataset.document(i)
        assert len(ids) == dataset.lengths[i] <= seq_len
        assert (int(mask.sum()), int(mask[0])) == (dataset.num_loss_tokens[i], 0)
        found.setdefault(dataset.origin(i)[1], []).append((ids.tolist(), mask.tolist()))
    assert list(found) == list(range(1, 12))
    bos = store.document(0)[0][0]
    for line, parts in found.items():
        ids, mask = (whole.tolist() for whole in store.document(line - 1))
        assert [token for own, _ in parts for token in own] == ids
        assert [own.count(bos) for own, _ in parts] == [1] + [0] * (len(parts) - 1)
        assert len(parts) == -(-len(ids) // seq_len)
        assert all(len(own) == seq_len for own, _ in parts[:-2])
        starts = np.cumsum([0] + [len(own) for own, _ in parts[:-1]])[1:]
        expected = [0 if i in starts else bit for i, bit in enumerate(mask)]  # the only tokens that are lost
        assert [bit for _, own in parts for bit in own] == expected
        lost += sum(mask) - sum(expected)
    report = dataset.reports[0]
    assert report.lost_target_tokens == lost > 0
    assert (report.split, report.parts) == (sum(len(p) > 1 for p in found.values()), sum(
        len(p) for p in found.values() if len(p) > 1))
    assert (report.kept, len(dataset.too_long), report.skipped) == (len(dataset), 0, {})


def test_the_parts_of_a_weighted_text_have_its_weight(opened, write):
    store = opened(write([{"text": "x y " * 40, "weight": 0.3}, {"text": "x y " * 40}]))
    dataset = Dataset([store], DataConfig(seq_len=16, overlong="split"))
    for i in range(len(dataset)):
        weights = dataset.document(i)[1]
        assert set(weights[1:]) == {0.3 if dataset.origin(i)[1] == 1 else 1}
        assert (weights[0], math.fsum(weights)) == (0, pytest.approx(dataset.loss_weights[i], rel=1e-12))
    first = [i for i in range(len(dataset)) if dataset.origin(i)[1] == 1]
    assert dataset.reports[0].weighted_tokens == sum(dataset.num_loss_tokens[i] for i in first)


def test_conversations_are_not_split_but_left_out_and_counted(opened, write):
    path = write([{"prompt": "x " * 40, "completion": "y"}, PAIR])
    dataset = Dataset([opened(path)], DataConfig(seq_len=30, overlong="split"))
    assert (len(dataset), dataset.reports[0].skipped, dataset.reports[0].split) == (1, {"over length": 1}, 0)


def test_a_part_that_the_disk_has_changed_is_found_when_it_is_read(opened, write, tmp_path):
    store = opened(write([{"text": "x y " * 50}]))
    dataset = Dataset([store], DataConfig(seq_len=16, overlong="split"))
    tokens = np.memmap(store.folder / "tokens.bin", np.uint32, "r+")
    tokens[40] ^= 1
    tokens.flush()
    assert len(dataset.document(0)[0]) == 16
    with pytest.raises(DamagedError, match="document 1 of 1 is not as it was written"):
        dataset.document(2)


def test_splitting_through_the_command(write, here, capsys):
    write([{"text": "x y " * 400}], "book.jsonl")
    assert here("--data.train", "book.jsonl", "--data.seq_len", "64", "--batch.packs", "1") == 2
    assert "split keeps plain text, in parts" in capsys.readouterr().err
    assert here("--data.train", "book.jsonl", "--data.seq_len", "64", "--batch.packs", "1", "--data.overlong", "split",
                "--dump", "d.jsonl") == 0
    out = capsys.readouterr().out
    dumped = [json.loads(line) for line in Path("d.jsonl").read_text().splitlines()]
    assert f"texts split into parts: 1 into {len(dumped)} documents" in out
    assert f"trained tokens lost to the length limit: {len(dumped) - 1}\n" in out
    assert all(len(one["ids"]) == 64 for one, _ in pairwise(dumped[:-1]))
    assert "left out" not in out


# ---- what is seldom meant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "what"), [
    ("I am {{name}}.", "placeholders"), ("{{ user name }}", "placeholders"), ("{{kişi_adı}}", "placeholders"),
    ("### Instruction:\nSay", "prompts"), ("a\n### Cevap: b", "prompts"), ("<|im_start|>user\nHi", "prompts"),
    ("<s>[INST] Hi [/INST]", "prompts"), ("<|start_header_id|>user", "prompts"), ("<start_of_turn>user", "prompts"),
    ("{{}} {{1+1}} { {a}} {{a", None), ("A ### Instruction manual", None), ("## Instructions", None), ("a <|b|>", None),
    ("### Inputs and outputs", None), ("### Heading", None), ("INST [inst]", None),
    ("### Human: Hi### Assistant: Ho", "prompts"), ("### Soru:\nA?\n### Cevap:\nB.", "prompts"),
    ("[INST] Hi [/INST] Ho", "prompts"), ("<|user|>\nHi\n<|assistant|>\nHo", "prompts"),
    ("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo", "prompts"),
])
def test_placeholders_and_rendered_prompts_are_counted_with_the_first_place(opened, write, text, what):
    records = [{"prompt": "a", "completion": "b"}, {"prompt": f"{text}", "completion": "b"},
               {"prompt": "a", "completion": text}, {"text": text}]
    for some in (records[:3], records[3:]):
        report = opened(write(some, f"{len(some)}.jsonl")).report
        expected = {name: 2 for name in checks.ODD if what and name.startswith(what)}
        if len(some) == 1:  # a plain text may speak of placeholders and headings
            answers = "<|", "Assistant:", "Cevap:", "[/INST]", "_turn>model"
            expected = {name: 1 for name in checks.ODD if what == "prompts" and name.startswith("conversations")
                        and any(mark in text for mark in answers)}
        assert report.odd == expected
        for name in expected:
            assert f"{len(some)}.jsonl:{min(len(some), 2)}: '" in report.examples[name]


def test_the_report_warns_of_them_and_of_much_that_is_left_out(write, here, capsys):
    odd = [{"prompt": "I am {{name}}", "completion": "b"}]
    write([PAIR] * 99 + odd, "much.jsonl")
    write([PAIR] * 100 + odd, "little.jsonl")
    assert here("--data.train", "much.jsonl,little.jsonl", "--batch.packs", "1") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "warning much has placeholders in 1 of 100 records (first: much.jsonl:100: '{{name}}'): the model would " \
           "learn to write them; fill them in" in text
    assert "little has" not in text
    assert "longer than data.seq_len" not in text


def test_a_column_of_rendered_conversations_is_warned_of(write, here, capsys):
    """As scripts for TRL have it: all of it would be trained, and its marks are no control tokens here."""
    chat = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    write([{"text": chat}, {"text": "Hi."}], "rendered.jsonl")
    assert here("--data.train", "rendered.jsonl", "--batch.packs", "1") == 0
    assert "warning rendered has conversations rendered to one text in 1 of 2 records (first: rendered.jsonl:1: " \
           "'<|start_header_id|>'): their marks stay text, and the questions are trained too; give the turns as " \
           "messages" in " ".join(capsys.readouterr().out.split())
    long = [{"prompt": "a", "completion": "x " * (60 + 40 * (i == 5))} for i in range(6)]
    write([PAIR] * 10 + long, "long.jsonl")
    shutil.copy("long.jsonl", "other.jsonl")
    assert here("--data.train", "long.jsonl", "--data.eval", "other.jsonl", "--data.seq_len", "50", "--batch.packs",
                "1", "--json", "r.json") == 0
    text = " ".join(capsys.readouterr().out.split())
    found = json.loads(Path("r.json").read_text())
    lengths = [len(json.loads(line)["ids"]) for line in _dumped(here, capsys)]
    share = sum(lengths[10:]) / sum(lengths)
    for name in ("data.train", "other"):
        assert f"{name}: 6 documents with {share:.0%} of the tokens are longer than data.seq_len = 50 and left out " \
               f"(first: {name.replace('data.train', 'long')}.jsonl:11); {max(lengths):,} would keep them all; " in text
    assert len([line for line in found["beware"] if "longer than" in line]) == 2
    # On a few documents of an evaluation: the share is still of all of them.
    assert here("--data.train", "long.jsonl", "--data.eval", "other.jsonl", "--data.seq_len", "50", "--batch.packs",
                "1", "--eval.max_tokens", "50") == 0
    assert " ".join(capsys.readouterr().out.split()).count(f"6 documents with {share:.0%} of the tokens are") == 2
    assert here("--data.train", "long.jsonl", "--data.seq_len", str(max(lengths)), "--batch.packs", "1") == 0
    assert "longer than data.seq_len" not in capsys.readouterr().out


def _dumped(here, capsys):
    assert here("--data.train", "long.jsonl", "--batch.packs", "1", "--dump", "all.jsonl") == 0
    capsys.readouterr()
    return Path("all.jsonl").read_text().splitlines()
