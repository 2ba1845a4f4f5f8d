"""No field of a record is dropped silently: it is read, it leaves the record out, or it is counted by name.

The oracle for the counts is a Counter over the raw records, written in the test.
"""

import gzip
import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest

from minisft.__main__ import main
from minisft.data.conversation import Conversation, Skip, Skipped, Turn
from minisft.errors import UserError
from minisft.formats.fields import MAX_NAMES, OTHERS, written
from minisft.formats.parse import read
from minisft.runs.lifecycle import main as train

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
EMPTY = ["", " ", "null", "[]", "{}", None, [], {}]
RECORDS = {
    "alpaca": {"instruction": "a", "output": "b"}, "dolly": {"instruction": "a", "response": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "messages": {"messages": TALK}, "prompt_completion": {"prompt": "a", "completion": "b"},
    "conversational": {"prompt": TALK[:1], "completion": TALK[1:]}, "text": {"text": "a"},
    "oasst": {"message_tree_id": "t", "prompt": {"text": "a", "role": "prompter", "replies": [
        {"text": "b", "role": "assistant", "replies": []}]}},
}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.fixture
def one(tmp_path):
    """The single result of a record, and the fields that nothing read."""
    def one(record, ignore=(), **options):
        file = tmp_path / "a.jsonl"
        file.write_text(json.dumps(record))
        unread = {}
        (found,) = read(file, ignore=ignore, unread=unread, **options)
        return found, unread

    return one


def called(call, **fields):
    """A conversation in which a tool is called, with `fields` in the turn that calls."""
    return {"messages": [TALK[0], {"role": "assistant", "tool_calls": call, **fields},
                         {"role": "tool", "content": "1"}, TALK[1]]}


def reason(found):
    assert isinstance(found, Skipped), found
    return found.reason


# Unknown fields

@pytest.mark.parametrize("format", RECORDS)
def test_unknown_fields_are_counted_by_name_unless_they_are_empty(one, format):
    plain, unread = one(RECORDS[format])
    assert (type(plain), unread) == (Conversation, {})
    for value in (1, 0, False, "x", [0], {"a": 1}):
        assert one({**RECORDS[format], "topic": value}) == (plain, {"topic": 1})
    for value in EMPTY:
        assert one({**RECORDS[format], "topic": value}) == (plain, {})


def test_unknown_fields_of_turns_calls_tasks_and_messages_have_their_place_in_the_name(one):
    talk = [{**TALK[0], "mood": "x"}, {**TALK[1], "mood": "y", "name": "Ali"}]
    assert one({"messages": talk})[1] == {"messages[].mood": 1, "messages[].name": 1}
    assert one({"prompt": talk[:1], "completion": talk[1:]})[1] == {
        "prompt[].mood": 1, "completion[].mood": 1, "completion[].name": 1}
    assert one({"conversations": talk})[1] == {"conversations[].mood": 1, "conversations[].name": 1}
    found, unread = one(called([{**CALL, "id": "c", "score": 1, "function": {**CALL["function"], "why": "x"}}]))
    assert (found.turns[1].content, unread) == ('{"x": 1}', {"messages[].call.score": 1, "messages[].call.why": 1})
    assert one({"instruction": "a", "instances": [{"output": "b", "n": 1}]})[1] == {"instances[].n": 1}
    tree = {"message_tree_id": "t", "prompt": {"text": "a", "role": "prompter", "lang": "tr", "x": 1, "replies": [
        {"text": "b", "role": "assistant", "emojis": {"+1": 2}}]}}
    assert one(tree)[1] == {"replies[].x": 1}


def test_counts_are_of_records_also_of_those_left_out(tmp_path):
    rows = [{"text": "a", "id": 1}, {"text": "", "id": 2, "url": "u"}, {"text": "c", "url": None}]
    file, unread = tmp_path / "a.jsonl", {}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(list(read(file, unread=unread))) == 3
    assert unread == {"id": 2, "url": 1}
    file.write_text("".join(json.dumps({"text": "a", f"k{i}": 1}) + "\n" for i in range(MAX_NAMES + 50)))
    unread = {}
    list(read(file, unread=unread))
    assert (len(unread), unread[OTHERS]) == (MAX_NAMES + 1, 50)


def test_a_name_cannot_steer_the_terminal(one):
    first, second = one({"text": "a", "\x1b[2Jx": 1, "y" * 999: 1})[1]
    assert first == r"'\x1b[2Jx'"
    assert len(second) < 90


# Fields that change the meaning

@pytest.mark.parametrize("name", [
    "chosen", "rejected", "images", "image", "videos", "audios", "reasoning_content", "reasoning", "thinking", "mask",
    "train_detail"])
@pytest.mark.parametrize("format", RECORDS)
def test_what_changes_the_meaning_leaves_the_record_out_and_is_counted(one, format, name):
    plain, _ = one(RECORDS[format])
    found, _ = one({**RECORDS[format], name: ["x"]})
    remedy = f"(--data.ignore {name} takes the record without it)"
    assert reason(found) == f"{name} changes the meaning and is not read {remedy}"
    assert one({**RECORDS[format], name: ["x"]}, ignore=[name]) == (plain, {})
    assert all(one({**RECORDS[format], name: value}) == (plain, {}) for value in EMPTY)


def test_a_gap_of_a_table_in_json_text_is_a_value_like_any_other(one):
    """pandas has NaN for what is missing, and json.dumps writes it so."""
    talk = json.dumps([TALK[0], {**TALK[1], "rating": float("nan")}])
    found, unread = one({"messages": talk})
    assert (found.turns, unread) == (one(RECORDS["messages"])[0].turns, {"messages[].rating": 1})


def test_in_a_turn_too(one):
    for name in ("reasoning_content", "thinking", "images", "tools"):
        talk = [TALK[0], {**TALK[1], name: "x"}]
        assert reason(one({"messages": talk})[0]).startswith(f"messages[].{name} changes the meaning and is not read")
        assert one({"messages": talk}, ignore=[name])[0].turns == one(RECORDS["messages"])[0].turns
    found, _ = one({"messages": [{**TALK[0], "tool_calls": [CALL]}, TALK[1]]})
    assert "tool_calls changes the meaning" in reason(found)
    assert reason(one({"messages": [{**TALK[0], "from": "human"}, TALK[1]]})[0]) == "wrong fields"


def test_values_of_a_table_that_are_no_json_leave_the_record_out(one):
    """A table's columns of arguments may hold dates and decimals."""
    for value in (datetime(2024, 5, 1), Decimal("1.5"), b"x"):
        with pytest.raises(Skip) as skip:
            written({"when": value}, "bad tool call")
        assert skip.value.reason == "bad tool call"


def test_a_label_of_a_preference_is_honoured(one):
    for format, record in RECORDS.items():
        plain, _ = one(record)
        for bad in (False, 0, "false", "0.0"):
            assert reason(one({**record, "label": bad})[0]) == "label says that the answer is bad", format
        for good in (True, 1, "True"):
            assert one({**record, "label": good}) == (plain, {})
        assert one({**record, "label": "sports"}) == (plain, {"label": 1})
        assert one({**record, "label": 0}, ignore=["label"]) == (plain, {})


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss", "loss_mask", "train", "training", "trainable"])
def test_every_weight_means_the_same_in_a_turn_and_of_a_record(one, key):
    for value, trained in ((False, False), (0, False), ("false", False), (1, True), (True, True), ("1", True),
                           ("", True)):
        found, unread = one({"messages": [TALK[0], {**TALK[1], key: value}]})
        assert (found.turns[1].trained, unread) == (trained, {})
        for record in RECORDS.values():
            found, unread = one({**record, key: value})
            assert (isinstance(found, Conversation), unread) == (trained, {})
            assert trained or reason(found) == "marked as not trained"
    assert reason(one({"text": "a", key: [1, 0]})[0]).startswith(f"{key} is not 0 or ")
    for record in RECORDS.values():  # the others say only if it is trained
        found, _ = one({**record, key: 0.5})
        if key in ("weight", "loss_weight"):
            assert (found.weight, found.turns[-1].trained) == (0.5, 1)
        else:
            assert reason(found) == f"{key} is not 0 or 1 (--data.ignore {key} takes the record without it)"


def test_a_question_that_is_marked_as_trained_is_noted(one):
    found, _ = one({"messages": [{**TALK[0], "train": True}, TALK[1]]})
    assert found.notes == ("a turn that is not an answer is marked as trained; only data.train_on = all trains on it",)
    assert one({"messages": [{**TALK[0], "train": False}, TALK[1]]})[0].notes == ()


def test_system_texts_under_every_name(one):
    for name in ("system", "system_prompt", "system_message"):
        for format, record in RECORDS.items():
            found, unread = one({**record, name: "Be brief."})
            if format in ("text", "oasst"):
                assert "changes the meaning" in reason(found)
            else:
                assert (found.turns[0], unread) == (Turn("system", "Be brief."), {}), format
    both = {**RECORDS["dolly"], "system": "x", "system_prompt": "x"}
    assert one(both)[0].turns[0].content == "x"
    assert reason(one({**both, "system": "y"})[0]) == "several system texts"


def test_history_and_contexts_are_read_or_leave_the_record_out(one):
    for format, record in RECORDS.items():
        for history in ([["q", "r"]], '[["q", "r"]]', ['["q", "r"]']):
            found, unread = one({**record, "history": history})
            if format in ("alpaca", "dolly", "prompt_completion", "conversational"):
                assert ([turn.content for turn in found.turns], unread) == (["q", "r", "a", "b"], {})
            else:
                assert "history changes the meaning" in reason(found)
    for format in ("alpaca", "dolly"):
        for name in ("input", "context"):
            assert one({**RECORDS[format], name: "c"})[0].turns[0].context == "c"
        assert reason(one({**RECORDS[format], "input": "c", "context": "d"})[0]) == "both input and context"


@pytest.mark.parametrize("record", [
    {**RECORDS["prompt_completion"], "response": "c"}, {**RECORDS["conversational"], "response": TALK[1:]},
    {**RECORDS["alpaca"], "instances": [{"input": "", "output": "c"}]}])
def test_of_two_answers_none_is_taken(one, record):
    names = [name for name in record if name in ("completion", "response", "output", "instances")]
    assert reason(one(record)[0]) == f"both {' and '.join(names)}"
    assert one({**record, names[1]: None})[0] == one({k: v for k, v in record.items() if k != names[1]})[0]


@pytest.mark.parametrize(("part", "expected"), [
    ({"train": False}, "messages[].content[].train changes the meaning"), ({"cache_control": {"type": "x"}}, "read"),
    ({"thought": True}, "messages[].content[].thought changes the meaning"), ({"train": None}, "read")])
def test_fields_of_a_part_of_a_content_are_looked_at(one, part, expected):
    content = [{"type": "text", "text": "b", **part}, {"type": "text", "text": "c"}]
    found, unread = one({"messages": [TALK[0], {"role": "assistant", "content": content}]})
    if expected == "read":
        assert found.turns[1].content == "bc"
        assert unread == {f"messages[].content[].{name}": 1 for name in part if part[name]}
    else:
        assert reason(found).startswith(expected)


@pytest.mark.parametrize("record", [
    {"messages": json.dumps([{**TALK[0], "content": "\ud83d"}, TALK[1]])},
    {"messages": [json.dumps({**TALK[0], "content": "\ud83d"}), TALK[1]]},
    {**RECORDS["alpaca"], "history": json.dumps([["\ud83d", "b"]])},
    {"instruction": "a", "instances": json.dumps([{"input": "\ud83d", "output": "b"}])},
    {"messages": TALK, "tools": "[]", "builtin_tools": json.dumps(["\ud83d"])}])
def test_half_of_a_surrogate_pair_in_json_text_leaves_the_record_out(one, record):
    assert reason(one(record)[0]) == "half of a surrogate pair in JSON text"
    whole = json.loads(json.dumps(record).replace("\\\\ud83d", "\\\\ud83d\\\\ude00"))
    assert whole != record
    assert isinstance(one(whole)[0], Conversation)


def test_lists_of_messages_may_be_text_as_in_csv(one):
    record = RECORDS["conversational"]
    as_text = {name: json.dumps(messages) for name, messages in record.items()}
    found = one(as_text)[0]
    assert found.turns == one(record)[0].turns
    for change in ({"prompt": "a"}, {"completion": "[1, 2]"}, {"completion": '[{"a": 1}]'}, {"prompt": "[x"}):
        mixed = one({**as_text, **change})[0]
        assert [turn.content for turn in mixed.turns] == list({**as_text, **change}.values()), "an answer may be JSON"


def test_ignored_fields_are_absent_before_the_format_is_known(one):
    both = {"messages": TALK, "text": "x"}
    with pytest.raises(UserError, match="more than one format matches"):
        one(both)
    assert one(both, ignore=["text"]) == one({"messages": TALK})
    padded = {"messages": TALK, "text": None, "prompt": None, "completion": None}
    assert one(padded) == one({"messages": TALK})


# JSON in strings, and nothing said in many ways

def test_role_and_content_under_both_names(one):
    plain = one(RECORDS["sharegpt"])[0].turns
    for field in ("conversations", "messages"):
        for names in (("role", "content"), ("from", "value"), ("role", "value")):
            talk = [dict(zip(names, pair, strict=True)) for pair in (("user", "a"), ("gpt", "b"))]
            padded = [{"from": None, "value": None, "role": None, "content": None, **turn} for turn in talk]
            for turns in (talk, padded, json.dumps(talk), list(map(json.dumps, talk))):
                assert one({field: turns})[0].turns == plain


@pytest.mark.parametrize("empty", EMPTY)
def test_empty_forms_are_alike_wherever_json_may_stand_in_a_string(one, empty):
    for format, record in RECORDS.items():
        names = ("history", "system", "images") + ("tools", "functions", "builtin_tools") * (format != "text")
        for name in names:
            found, unread = one({**record, name: empty})
            assert (found.turns, found.tools, unread) == (one(record)[0].turns, (), {}), (format, name)
    for name in ("tool_calls", "function_call"):
        assert one({"messages": [TALK[0], {**TALK[1], name: empty}]})[0].turns == one(RECORDS["messages"])[0].turns
    for arguments in ({"arguments": empty}, {}):
        found, _ = one(called([{"function": {"name": "f", **arguments}}]))
        assert found.turns[1] == Turn("call", "{}", tool="f")
    assert reason(one({"messages": empty})[0]) == "no turns"
    assert reason(one({"instruction": "a", "instances": empty})[0]) == "no turns"


def test_calls_and_definitions_in_strings(one):
    plain = one(called([CALL]))[0].turns
    function = {"name": "f", "arguments": '{"x": 1}'}
    for call in (json.dumps([CALL]), [json.dumps(CALL)], CALL, {"function": json.dumps(function)},
                 {"function": function}, {"name": "f", "parameters": {"x": 1}}):
        assert one(called(call))[0].turns == plain
    assert reason(one(called([{"function": {"name": "f", "args": {"x": 1}}}]))[0]) == "bad tool call"
    assert reason(one(called([CALL], function_call=CALL["function"]))[0]) == "several tool calls in one turn"
    assert one(called([{"function": {"name": "f"}, "arguments": {"x": 1}}]))[1] or True
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    written = {**tool, "function": json.dumps({"name": "f", "parameters": json.dumps({"type": "object"})})}
    for tools in ([tool], [written], json.dumps([written]), [json.dumps(tool)]):
        assert one({"messages": TALK, "tools": tools})[0].tools == (tool,)


def test_nulls_that_pad_arguments_and_definitions_are_dropped_and_noted(one):
    note = ("null fields of tools dropped",)
    padded = {"x": 1, "y": None, "z": {"w": None, "v": [None, 0]}}
    for arguments in (padded, json.dumps(padded)):
        found, _ = one(called([{"function": {"name": "f", "arguments": arguments}}]))
        assert (json.loads(found.turns[1].content), found.notes) == ({"x": 1, "z": {"v": [None, 0]}}, note)
    found, _ = one({"messages": TALK, "tools": [{"name": "f", "parameters": {"a": {}, "b": None}}]})
    assert (found.tools, found.notes) == (({"name": "f", "parameters": {"a": {}}},), note)
    assert one(called([CALL]))[0].notes == ()


# What the first bytes say

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PLAIN = b'{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize(("content", "name", "message"), [
    (PLAIN.decode().encode("utf-16"), "a.jsonl", r"this is UTF-16 \(remedy: iconv -f UTF-16 -t UTF-8 .*jsonl > NEW\."),
    (b"\xfe\xff" + PLAIN.decode().encode("utf-16-be"), "a.txt", r"this is UTF-16 \(remedy: iconv .*txt > NEW\.txt\)"),
    (PLAIN.decode().encode("utf-16-le"), "a.json", r"UTF-16LE without a byte-order mark \(remedy: iconv -f UTF-16LE"),
    (PLAIN.decode().encode("utf-16-be"), "a.json", r"UTF-16BE without a byte-order mark \(remedy: iconv -f UTF-16BE"),
    (PLAIN.decode().encode("utf-32"), "a.json", r"this is UTF-32 \(remedy: iconv -f UTF-32"),
    (POINTER, "a.json", r"Git LFS pointer, .*git lfs pull"),
    (POINTER, "a.txt", r"Git LFS pointer, .*git lfs pull"),
    (b"PAR1\x15", "a.jsonl", r"this is Parquet \(remedy: name it so: mv .*a\.jsonl NEW\.parquet\)"),
    (b"PAR1\x15", "a.parquet", r"a\.parquet: pyarrow cannot read this: .*\(remedy: fetch"),
    (b"PK\x03\x04", "a.json", r"this is a zip archive \(remedy: unzip "),
    (b"\x28\xb5\x2f\xfd", "a.jsonl.zst", r"this is compressed with zstd \(remedy: zstd -d "),
    (gzip.compress(gzip.compress(PLAIN, mtime=0), mtime=0), "a.jsonl.gz", r"this is gzip inside gzip"),
    (gzip.compress(b"x" * 257 + b"ustar" + b"x" * 300, mtime=0), "a.json.gz", r"this is a tar archive"),
    (bytes(100), "a.jsonl", r"this is zero bytes, as an interrupted copy leaves behind \(remedy: fetch"),
    (b"<!DOCTYPE html><html>Sign in", "a.jsonl", r"this is HTML or XML, often an error page"),
    (b"instruction,output\na,b\n", "a.jsonl", r"this is not JSON: it begins 'instruction,output\\na,b.*convert it "),
])
def test_first_bytes_are_named_before_any_advice(tmp_path, content, name, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read(tmp_path / name))
    assert "skip_bad" not in str(error.value)


def test_gzip_is_known_by_its_bytes_whatever_the_name(tmp_path):
    packed, array = gzip.compress(PLAIN), gzip.compress(b"[" + PLAIN.strip().replace(b"\n", b",") + b"]")
    for name, content in (("a.jsonl", packed), ("b.jsonl.gz", PLAIN), ("c.jsonl.gz", packed), ("d.json", array)):
        (tmp_path / name).write_bytes(content)
        assert [c.turns[0].content for c in read(tmp_path / name)] == ["a", "b"]
    (tmp_path / "e.txt").write_bytes(b"<p>not JSON, and need not be</p>")
    assert next(read(tmp_path / "e.txt")).turns[0].content.startswith("<p>")
    (tmp_path / "f.jsonl").write_bytes(b"# a comment\n" + PLAIN)
    assert [type(found) for found in read(tmp_path / "f.jsonl", skip_bad=True)] == [Skipped, Conversation, Conversation]


# What is shown

@pytest.fixture
def recipe(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": TALK, "topic": 1}, {"messages": TALK, "id": 2}, {"messages": TALK, "topic": 3},
            {"messages": TALK, "images": ["1.jpg"]}]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.toml").write_text(f'[model]\npath = "{base}"\n[data]\ntrain = ["chats.jsonl"]\ntemplate = "llama3"\n'
                              'cache = "cache"\neval = ["chats.jsonl"]\n[train]\nprecision = "fp32"\nmax_steps = 1\n'
                              '[optim]\nwarmup_steps = 0\n[batch]\npacks = 1\n')
    return "r.toml"


BEWARE = "chats has fields that nothing reads: topic (2), id (1)"
LEFT_OUT = ("left out, images changes the meaning and is not read (--data.ignore images takes the record without it): "
            "1 (first: chats.jsonl:4: ['1.jpg'])")


def test_prepare_show_and_a_run_say_what_nothing_reads(recipe, capsys):
    assert main(["prepare", recipe, "--json", "report.json"]) == 0
    printed = capsys.readouterr().out
    assert f"\nwarning  {BEWARE}\n" in printed
    assert LEFT_OUT in printed
    report = json.loads(Path("report.json").read_text())
    assert report["train"][0]["unread"] == report["eval"][0]["unread"] == {"topic": 2, "id": 1}
    assert report["beware"][0] == BEWARE
    for options in ([], ["--html", "page.html"]):
        assert main(["show", recipe, *options]) == 0
        assert f"warning: {BEWARE}\n" in capsys.readouterr().out
    assert train([recipe]) == 0
    started = capsys.readouterr().out
    assert f"\nwarning  {BEWARE}\n" in started
    assert LEFT_OUT in started


def test_ignoring_is_a_remedy_that_works_and_makes_another_store(recipe, capsys):
    assert main(["prepare", recipe]) == main(["prepare", recipe, "--data.ignore", "images,topic,id"]) == 0
    first, second = capsys.readouterr().out.split("source ", 2)[1:]
    assert ("nothing reads" in first, "nothing reads" in second) == (True, False)
    assert "left out" not in second
    assert len([folder for folder in Path("cache").iterdir() if folder.is_dir()]) == 2


# What else is allowed, and seldom meant

@pytest.mark.parametrize(("options", "beware"), [
    (["--train.max_steps", "50", "--train.epochs", "3"],
     "train.max_steps = 50 is not reached: the run ends after 3 steps, with train.epochs = 3"),
    (["--train.max_steps", "2"],
     "train.max_steps = 2 is more than one epoch of 1 steps: documents are trained on up to 2 times"),
    (["--train.max_steps", "2", "--data.train", "[{path = 'chats.jsonl', weight = 2.5}]"],
     "train.max_steps = 2 is more than one epoch of 1 steps: documents are trained on up to 6 times"),
    (["--train.max_steps", "1", "--data.eval", "long.jsonl"], "the longest document has "),
])
def test_other_warnings(recipe, base, capsys, options, beware):
    network = json.loads((base / "config.json").read_text())
    Path("long.jsonl").write_text(json.dumps({"text": "abc " * network["max_position_embeddings"]}))
    assert main(["prepare", recipe, *options, "--data.seq_len", "100000", "--json", "report.json"]) == 0
    [found] = [text for text in json.loads(Path("report.json").read_text())["beware"] if text.startswith(beware)]
    assert " ".join(found.split()) in " ".join(capsys.readouterr().out.split())
