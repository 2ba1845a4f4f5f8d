"""Readers: a file gives exactly the conversations it holds, a counted reason for each record left out, or a UserError.

The oracles are json.load for the array reader, a recursive walk for OASST's trees, and fixtures written out by hand.
"""

import gzip
import json
import re
import shlex
import tomllib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisft import config
from minisft.data.conversation import Conversation, Skipped, Turn
from minisft.errors import UserError
from minisft.formats import records as reader
from minisft.formats.parse import FIELDS, read

U, A, S = "user", "assistant", "system"
TURKISH = "Borsada düşüş ne anlama gelir? İĞŞğış 📉"
PAIR = {"instruction": TURKISH, "output": "Değer kaybı."}


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def one(write):
    """The single result of a single record."""

    def one(record, **options):
        (result,) = read(write([record]), **options)
        return result

    return one


def turns(conversation):
    assert isinstance(conversation, Conversation), conversation
    return [(turn.role, turn.content) for turn in conversation.turns]


def drain(path, **options):
    """The results before the end or the error, and the error's text or None."""
    found = []
    try:
        for result in read(path, **options):
            found.append(result)
    except UserError as error:
        return found, str(error)
    return found, None


def reason(result):
    assert isinstance(result, Skipped), result
    return result.reason


def messages(*pairs, **fields):
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **fields}


# ---- each format -----------------------------------------------------------------------------------------------------


def test_alpaca_takes_input_system_and_history_and_keeps_whitespace(one):
    record = {"instruction": "  Özetle: \n", "input": "Uzun metin ", "output": " Kısa.\n", "system": "Kısa yaz."}
    expected = (Turn(S, "Kısa yaz."), Turn(U, "  Özetle: \n", context="Uzun metin "), Turn(A, " Kısa.\n"))
    assert one(record).turns == expected
    record = {"instruction": "c", "output": "d", "input": None, "system": "", "history": [["a", "b"]]}
    assert one(record).turns == (Turn(U, "a"), Turn(A, "b"), Turn(U, "c"), Turn(A, "d"))


def test_seed_tasks_give_one_conversation_for_each_instance_and_skip_only_the_bad_one(write):
    pairs = [("Gece : Gündüz", "zıt"), ("", ""), ("x", "y")]
    instances = [{"input": context, "output": answer} for context, answer in pairs]
    first, second, third = read(write([{"instruction": "İlişki?", "instances": instances}]))
    assert first.turns == (Turn(U, "İlişki?", context="Gece : Gündüz"), Turn(A, "zıt"))
    assert reason(second) == "no answer"
    assert third.turns == (Turn(U, "İlişki?", context="x"), Turn(A, "y"))
    assert first.line == second.line == third.line == 1


def test_dolly(one):
    record = {"instruction": "Kim?", "context": "Metin", "response": "Ali", "category": "closed_qa"}
    assert one(record).turns == (Turn(U, "Kim?", context="Metin"), Turn(A, "Ali"))


def test_sharegpt_roles_and_system(one):
    for user in ("human", "user"):
        for assistant in ("gpt", "assistant", "chatgpt", "bing", "bard"):
            talk = [{"from": user, "value": "Merhaba"}, {"from": assistant, "value": "Selam"}]
            assert turns(one({"conversations": talk})) == [(U, "Merhaba"), (A, "Selam")]
            assert turns(one({"conversations": talk, "system": "s"})) == [(S, "s"), (U, "Merhaba"), (A, "Selam")]
    talk.insert(0, {"from": "system", "value": "s"})
    assert turns(one({"conversations": talk})) == [(S, "s"), (U, "Merhaba"), (A, "Selam")]


def test_a_system_field_beside_the_messages_is_their_system_turn(one):
    for talk in ({"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b"}]},
                 {"prompt": "a", "completion": "b"},
                 {"prompt": [{"role": U, "content": "a"}], "completion": [{"role": A, "content": "b"}]}):
        assert turns(one({**talk, "system": "s"})) == [(S, "s"), (U, "a"), (A, "b")]
        assert turns(one({**talk, "system": None})) == turns(one({**talk, "system": " "})) == [(U, "a"), (A, "b")]


def test_messages_of_strings_and_of_parts(one):
    parts = [{"type": "text", "text": "Mer"}, {"type": "text", "value": "haba"}]
    record = messages(("developer", "s"), (U, parts), (A, [{"type": "text", "value": "Selam"}]))
    assert turns(one(record)) == [(S, "s"), (U, "Merhaba"), (A, "Selam")]


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_prompt_completion_of_strings_keeps_the_prompt_exactly(one, answer):
    assert turns(one({"prompt": "### Soru:\n x \n\n", answer: " y"})) == [(U, "### Soru:\n x \n\n"), (A, " y")]


def test_prompt_completion_of_messages_trains_the_completion_only(one):
    prompt = messages((S, "s"), (U, "a"), (A, "b"), (U, "c"))["messages"]
    record = {"prompt": prompt, "completion": messages((A, "d"))["messages"]}
    expected = (Turn(S, "s"), Turn(U, "a"), Turn(A, "b", trained=False), Turn(U, "c"), Turn(A, "d", trained=True))
    assert one(record).turns == expected
    assert reason(one({**record, "completion": []})) == "no answer"
    assert reason(one({**record, "completion": "d"})) == "wrong fields"


def test_text_records_and_text_files(one, write):
    assert one({"text": " Bir belge.\n"}).turns == (Turn("text", " Bir belge.\n"),)
    assert reason(one({"text": " \n"})) == "blank turn"
    text = "Satır bir\r\n\x00Satır iki\u2028\n"
    for name, pack in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
        (document,) = read(write(pack(b"\xef\xbb\xbf" + text.encode()), name))
        assert document.turns == (Turn("text", text),)
        assert document.line == 1
    with pytest.raises(UserError, match=r"a\.txt: a \.txt file has no records of format 'alpaca' \(remedy"):
        list(read(write(text, "a.txt"), format="alpaca"))


# ---- OASST -----------------------------------------------------------------------------------------------------------


def message(text, role, *replies, **fields):
    return {"text": text, "role": role, "replies": list(replies), **fields}


def tree(root):
    return {"message_tree_id": "t", "tree_state": "prompt_lottery_waiting", "prompt": root}


P = "prompter"
FOREST = message(
    "q", P,
    message("a1", A, message("q1", P), message("q2", P), message("q3", P, message("a3", A)), rank=1),
    message("a2", A, message("q4", P, message("a4", A, rank=None), message("a5", A, rank=0)), rank=0),
    message("gone", A, message("q5", P, message("a6", A)), deleted=True, rank=-1),
)  # fmt: skip


def test_oasst_takes_every_path_cut_after_its_last_answer_once(write):
    found = [" ".join(turn.content for turn in c.turns) for c in read(write([tree(FOREST)]))]
    assert found == ["q a1", "q a1 q3 a3", "q a2 q4 a4", "q a2 q4 a5"]


def test_oasst_best_follows_the_lowest_rank_where_none_is_last_and_ties_keep_their_order(one):
    assert [content for _, content in turns(one(tree(FOREST), oasst="best"))] == ["q", "a2", "q4", "a5"]
    ties = message("q", P, message("x", A), message("y", A, rank=2), message("z", A, rank=2))
    assert turns(one(tree(ties), oasst="best")) == [(U, "q"), (A, "y")]


def test_oasst_trees_that_hold_no_conversation(one):
    assert reason(one(tree(message("q", P)))) == "no assistant turn"
    assert reason(one(tree(message("q", P, message("a", A), deleted=True)))) == "no turns"
    assert reason(one(tree(message("q", P, message("a", "bot"))))) == "unknown role"
    assert reason(one(tree("q"))) == "wrong fields"
    assert reason(one(tree(message("q", P, "a")))) == "wrong fields"


def naive_paths(node):
    live = [reply for reply in node["replies"] if not reply.get("deleted")]
    if not live:
        return [[(node["role"], node["text"])]]
    return [[(node["role"], node["text"]), *path] for reply in live for path in naive_paths(reply)]


@given(shape=st.recursive(st.booleans(), lambda children: st.lists(children, max_size=4), max_leaves=25))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_oasst_paths_equal_a_recursive_walk(write, shape):
    names = iter(range(10**6))

    def grow(shape, depth):
        replies = [grow(s, depth + 1) for s in shape] if isinstance(shape, list) else []
        return message(str(next(names)), (P, A)[depth % 2], *replies, deleted=shape is True and depth > 0)

    root, expected = grow(shape, 0), []
    for path in naive_paths(root):
        while path and path[-1][0] == P:
            path.pop()
        if path and path not in expected:
            expected.append(path)
    found = [c for c in read(write([tree(root)])) if isinstance(c, Conversation)]
    assert [[t.content for t in c.turns] for c in found] == [[text for _, text in path] for path in expected]


# ---- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (messages(), "no turns"),
        (messages((S, " ")), "no turns"),
        (messages((U, "a")), "no assistant turn"),
        (messages((A, "a"), (A, "b"), (U, "c"), (A, "d")), "starts with the assistant"),
        (messages((S, "s"), (A, "a"), (U, "b")), "starts with the assistant"),
        (messages((U, "a"), (U, "b"), (A, "c")), "neighbouring turns of one role"),
        (messages((U, "a"), (A, "b"), (A, "c")), "neighbouring turns of one role"),
        (messages((U, "a"), (S, "s"), (A, "b")), "system turn in the middle"),
        (messages((S, "s"), (S, "t"), (U, "a"), (A, "b")), "system turn in the middle"),
        (messages((U, " \n"), (A, "b")), "blank turn"),
        (messages((U, None), (A, "b")), "blank turn"),
        (messages((U, "a"), (A, "\t")), "no answer"),
        (messages((U, "a"), (A, None)), "no answer"),
        (messages((U, "a"), (A, 7)), "answer is not text"),
        (messages((U, 7), (A, "b")), "content is not text"),
        (messages((S, {}), (U, "a"), (A, "b")), "content is not text"),
        (messages((U, [{"type": "image", "text": "x"}]), (A, "b")), "content is not text"),
        (messages((U, [{"type": "text", "text": 1}]), (A, "b")), "content is not text"),
        (messages(("critic", "a"), (A, "b")), "unknown role"),
        (messages((["user"], "a"), (A, "b")), "unknown role"),
        ({"messages": "hi"}, "wrong fields"),
        ({"messages": ["hi"]}, "wrong fields"),
        ({"conversations": [{"from": "observer", "value": "a"}]}, "unknown role"),
        ({"instruction": "a", "output": None}, "no answer"),
        ({"instruction": "a", "output": "b", "input": 3}, "context is not text"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "wrong fields"),
        ({"instruction": "a", "instances": []}, "no turns"),
        ({"instruction": "a", "instances": ["b"]}, "wrong fields"),
        ({"prompt": "a", "completion": ""}, "no answer"),
        ({"text": 5}, "content is not text"),
    ],
)
def test_a_breach_of_a_rule_is_skipped_with_its_reason(one, record, expected):
    assert reason(one(record)) == expected


def test_a_blank_system_turn_is_dropped_and_what_follows_the_last_answer_is_cut(one):
    for end in ([(U, "c")], [(U, ""), (S, "s")]):
        found = one(messages((S, "\n"), (U, "a"), (A, "b"), *end))
        assert turns(found) == [(U, "a"), (A, "b")]
        assert found.notes == ("end without an answer cut",)
    assert one(messages((S, "\n"), (U, "a"), (A, "b"))).notes == ()


def test_a_first_answer_without_a_question_is_dropped_and_noted(one):
    for first in ("Welcome!", "", None, 7):
        found = one(messages((S, "s"), (A, first), (U, "a"), (A, "b")))
        assert turns(found) == [(S, "s"), (U, "a"), (A, "b")]
        assert found.notes == ("leading assistant turn dropped",)
    talk = [("gpt", "x"), ("human", "a"), ("gpt", "b"), ("human", "c")]
    talk = [{"from": role, "value": text} for role, text in talk]
    found = one({"conversations": talk})
    assert turns(found) == [(U, "a"), (A, "b")]
    assert found.notes == ("end without an answer cut", "leading assistant turn dropped")


def test_an_empty_list_of_tools_is_no_tools(one):
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for tools in ("[]", "", [], None):
        assert turns(one({"conversations": talk, "tools": tools})) == [(U, "a"), (A, "b")]
        assert one({"conversations": talk, "tools": tools}).tools == ()


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train"])
def test_flags_and_weights_say_what_is_trained(one, key):
    def answer(ignore=(), **fields):
        return one({"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b", **fields}]}, ignore=ignore)

    assert [answer(**{key: value}).turns[1].trained for value in (0, 0.0, False)] == [False] * 3
    assert [answer(**{key: value}).turns[1].trained for value in (1, 1.0, True, None)] == [True] * 4
    graded = key != "train"
    for value in (0.5, 2, 1e-12, 1e12, "0.5", " 2 ", "1e-3"):
        found = answer(**{key: value})
        assert found.turns[1].trained == float(value) if graded else isinstance(found, Skipped)
    assert [answer(**{key: text}).turns[1].trained for text in ("0.0", "1.0", "0", "1", "true")] == [0, 1, 0, 1, 1]
    remedy = f"(--data.ignore {key} takes the record without it)"
    for value in ("no", "nan", "0,5", -1, [], -0.5, 1e-101, 1e101, 10**400, {"a": 1}):
        found = answer(**{key: value})
        assert found.reason == f"{key} is not 0 or {'a number from 1e-12 to 1e+12' if graded else '1'} {remedy}"
        assert key in found.detail
    assert isinstance(answer(ignore=[key], **{key: -1}), Conversation)


def test_an_infinite_weight_is_left_out(write):
    path = write([messages((U, "a"), (A, "b"))])
    path.write_text(path.read_text().replace('"b"', '"b", "weight": 1e999'))
    [found] = read(path)
    assert (found.reason.split(" (")[0], found.line) == ("weight is not 0 or a number from 1e-12 to 1e+12", 1)
    assert "inf" in found.detail


def test_weights_that_contradict_each_other_leave_the_record_out(one):
    def answer(ignore=(), **fields):
        return one({"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b", **fields}]}, ignore=ignore)

    for fields in ({"weight": 1, "train": False}, {"weight": 0.3, "loss": 0}, {"weight": 0, "loss_weight": 0.5},
                   {"loss_weight": 0.5, "weight": 1}, {"train": 1, "loss": 0}):
        names = " and ".join(sorted(fields))
        assert reason(answer(**fields)) == f"{names} contradict each other (remedy: --data.ignore with one of them)"
        assert isinstance(answer(**fields, ignore=list(fields)[:1]), Conversation)
    for fields, trained in (({"weight": 2.5, "train": True}, 2.5), ({"weight": 0.3, "loss": 1}, 0.3),
                            ({"weight": 0.3, "loss_weight": 0.3}, 0.3), ({"weight": 0, "train": False}, 0)):
        assert answer(**fields).turns[1].trained == trained


def test_too_many_different_weights_are_left_out(one):
    def talk(count):
        return one({"messages": [message for i in range(count) for message in (
            {"role": U, "content": "a"}, {"role": A, "content": "b", "weight": 1 + i})]})

    assert len(talk(254).turns) == 508
    assert reason(talk(255)) == "more than 254 different weights in a conversation (remedy: round them)"


def test_skipped_says_where_and_what(write):
    path = write([messages((U, "a"), (A, "b")), messages((U, "a"), (A, 7 * 10**9))])
    assert list(read(path))[1] == Skipped("answer is not text", "7000000000", str(path), 2)
    (skipped,) = read(write([messages(("x" * 9999, "a"))]))
    assert len(skipped.detail) < 210


# ---- which format ----------------------------------------------------------------------------------------------------


def test_the_first_record_decides_and_later_ones_without_its_fields_are_skipped(write):
    first, second = read(write([PAIR, messages((U, "a"), (A, "b"))]))
    assert turns(first) == [(U, TURKISH), (A, "Değer kaybı.")]
    assert (reason(second), second.line) == ("wrong fields", 2)


def test_no_format_or_more_than_one_is_an_error_that_lists_the_fields(write):
    with pytest.raises(UserError) as error:
        list(read(path := write([{"soru": "a", "cevap": "b"}])))
    assert str(error.value).startswith(f"{path}:1: no format matches a record with the fields soru, cevap: none of [")
    assert "alpaca: instruction + output or instruction + instances; dolly: instruction + resp" in str(error.value)
    remedy = """as in --data.fields '{instruction = "soru", output = "cevap"}')"""
    assert str(error.value).endswith(remedy)
    columns = tomllib.loads(f"fields = {shlex.split(remedy[:-1])[-1]}")["fields"].items()
    assert turns(*read(path, columns=columns)) == [(U, "a"), (A, "b")]
    both = {"instruction": "a", "output": "b", "text": "c"}
    with pytest.raises(UserError, match=r"more than one format .* alpaca, text of \[.*name the format with --"):
        list(read(write([both])))
    assert [turns(c) for c in read(write([both]), format="alpaca")] == [[(U, "a"), (A, "b")]]


def test_the_configuration_offers_the_formats_that_there_are():
    assert ("auto", *FIELDS) == config.FORMATS


def test_unknown_options_are_never_read_as_known_ones(write):
    with pytest.raises(UserError, match=r"unknown format 'alpacca' \(choices: auto, alpaca, dolly, sharegpt, oasst,"):
        read(write([PAIR]), format="alpacca")
    with pytest.raises(AssertionError, match="worst"):
        read(write([PAIR]), oasst="worst")


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "A.JSON", "a.json.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("layout", ["lines", "array"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_content_tells_lines_from_an_array_whatever_the_name(write, name, layout, bom, newline):
    records = [{"text": "bir\x00 \u2028 \x85"}, {"text": "iki\r\n"}]
    if layout == "lines":
        text = "\n" + "\n \n".join(json.dumps(r, ensure_ascii=False) for r in records)
    else:
        text = "\n" + json.dumps(records, ensure_ascii=False, indent=1)
    content = bom + text.replace("\n", newline).encode()
    path = write(gzip.compress(content) if name.endswith("gz") else content, name)
    expected = [(2, "bir\x00 \u2028 \x85"), (4 if layout == "lines" else 6, "iki\r\n")]
    if layout == "array":
        expected[0] = (3, expected[0][1])
    assert [(c.line, c.turns[0].content, c.source) for c in read(path)] == [(*e, str(path)) for e in expected]


@pytest.mark.parametrize("content", ["", " \n\r\n", "\ufeff", "[]", " [ \n ] \n"])
def test_files_without_records_yield_nothing(write, content):
    assert list(read(write(content, "a.json"))) == []
    assert list(read(write("", "a.txt"))) == []


GOOD = b'{"text": "a"}'
BAD = {
    b'{"text": "a"': "bad JSON: Expecting ',' delimiter at column 13",
    b'{"text": "\\ud83d"}': "bad JSON: lone surrogate '\\ud83d' in a string",
    b'{"\\udc00": 1, "text": "a"}': "bad JSON: lone surrogate '\\udc00' in a string",
    b'{"text": "a", "text": "b"}': "bad JSON: the key 'text' stands twice in an object",
    b'{"messages": [{"a": 1, "a": 1}]}': "bad JSON: the key 'a' stands twice in an object",
    b'{"text": NaN}': "bad JSON: NaN is not JSON",
    b'{"text": -Infinity}': "bad JSON: -Infinity is not JSON",
    b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}": "bad JSON: nested too deep",
    b'{"text": ' + b"1" * 4301 + b"}": "bad JSON: Exceeds the limit (4300 digits) for integer string conversion",
    b"7": "bad JSON: a record must be an object, not 7",
    b'{"text": "a"} {}': "bad JSON: Extra data at column 15",
    b'{"text": "\xff"}': "invalid UTF-8: invalid UTF-8 (byte 0xff: invalid start byte)",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[:24].decode("latin1"))
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_bad_record_stops_the_run_or_is_counted(write, bad, layout):
    if layout == "array" and bad == b'{"text": "a"':
        bad, message_ = b'{"text" "a"}', "bad JSON: Expecting ':' delimiter at column 9"
    else:
        message_ = BAD[bad]
    lines = [GOOD, bad, GOOD]
    path = write(b"\n".join(lines) if layout == "lines" else b"[" + b",\n".join(lines) + b"]")
    with pytest.raises(UserError) as error:
        list(read(path))
    remedy = "(remedy: fix the line or pass --data.skip_bad true)"
    assert str(error.value).startswith(f"{path}:2: {message_}")
    assert str(error.value).endswith(remedy)
    first, second, third = read(path, skip_bad=True)
    assert (first.line, second.line, third.line) == (1, 2, 3)
    assert turns(first) == turns(third) == [("text", "a")]
    assert reason(second) == message_.split(": ")[0]


def test_whole_surrogate_pairs_are_text(write):
    (found,) = read(write(b'{"text": "\\ud83d\\udcc9 \\u011f"}'))
    assert turns(found) == [("text", "📉 ğ")]


def test_one_object_over_several_lines_is_a_record_and_several_are_a_clear_error(write):
    pretty = json.dumps(PAIR, indent=2)
    for text in (pretty, "\n" + pretty + "\n \n", pretty.replace("{\n", '{ "id":\n 1,\n')):
        assert turns(*read(write(text, "a.json"))) == [(U, TURKISH), (A, "Değer kaybı.")]
    for text in (pretty + "\n" + pretty, pretty[:-1]):
        with pytest.raises(UserError, match=r"a\.json:1: JSON objects over several lines.*\(remedy: jq -c \. FILE"):
            list(read(write(text, "a.json"), skip_bad=True))
    (bad, good) = read(write(b'{"text": "a\n{"text": "b"}\n'), skip_bad=True)
    assert (reason(bad), turns(good)) == ("bad JSON", [("text", "b")])


@pytest.mark.parametrize("indent", [None, 2])
def test_splits_in_one_object_are_named_with_a_remedy_that_works(write, tmp_path, indent):
    path = write(json.dumps({"train": [PAIR, PAIR], "dev": [PAIR]}, indent=indent), "a.json")
    with pytest.raises(UserError, match=r"one object with lists of records, train \(2 records\), dev \(1 ") as error:
        list(read(path))
    named = shlex.split(re.search(r"--data\.train (.*)\)$", str(error.value))[1])[0]
    assert named == f"{path}#train"
    assert [turns(c) for c in read(named)] == [[(U, TURKISH), (A, "Değer kaybı.")]] * 2


def test_preferences_are_told_what_they_are(write):
    with pytest.raises(UserError, match=r"prompt, chosen, rejected: none .*these are preferences, and minisft "):
        list(read(write([{"prompt": "a", "chosen": "b", "rejected": "c"}])))


def test_the_line_of_an_error_is_the_errors_own_inside_a_long_record(write):
    for fault, line in ((b"\xff", 4), (b'"', 4)):
        path = write(b'[\n{\n"text":\n"a' + fault + b'",\n"b": 1}]', "a.json")
        with pytest.raises(UserError, match=rf"a\.json:{line}: "):
            list(read(path))
    with pytest.raises(UserError, match=r"a\.txt:3: invalid UTF-8 \(byte 0xe9.*\(remedy: save the file as UTF-8\)"):
        list(read(write(b"a\nb\ncaf\xe9", "a.txt")))


@pytest.mark.parametrize("text", ['[{"text": "a"},]', '[,{"text": "a"}]', '[{"text": "a"},,{"text": "a"}]'])
def test_a_comma_too_many_is_a_bad_record(write, text):
    with pytest.raises(UserError, match="bad JSON: Expecting value"):
        list(read(write(text)))
    assert sorted(type(found).__name__ for found in read(write(text), skip_bad=True))[-1] == "Skipped"


@pytest.mark.parametrize("tail", ["]", "{}", "\n \n[]"])
def test_text_after_the_array_is_an_error(write, tail):
    line = 1 + tail.count("\n")
    with pytest.raises(UserError, match=rf"jsonl:{line}: text after the end of the JSON array \(remedy: one array a"):
        list(read(write('[{"text": "a"}]' + tail), skip_bad=True))


ARRAY = '\ufeff[\n {"text": "ğ\\"}],[{"},\n {"text": "b\\\\", "n": [1, {"x": "]"}]},\r\n{"text":"\\u0131"} \n]'.encode()


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_an_array_cut_at_any_byte_is_an_error_and_its_whole_records_are_right(write, monkeypatch, chunk):
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    texts = ['ğ"}],[{', "b\\", "ı"]
    starts = [ARRAY.index(b'{"text": "\xc4'), ARRAY.index(b'{"text": "b'), ARRAY.index(b'{"text":"\\u')]
    ends = [ARRAY.index(b"},\n"), ARRAY.index(b"},\r\n"), ARRAY.index(b"} \n]")]
    for size in range(ARRAY.index(b"[") + 1, len(ARRAY)):
        found, error = drain(write(ARRAY[:size], "a.json"), skip_bad=True)
        whole = sum(end < size for end in ends)
        assert [turns(c) for c in found] == [[("text", text)] for text in texts[:whole]]
        inside = [start for start, end in zip(starts, ends, strict=True) if start < size <= end]
        ends_at = f"inside the record that starts at byte {inside[0]}" if inside else f"at byte {size}, without its ]"
        assert f"is cut off: the file ends {ends_at}, after {whole} complete records (remedy: " in error
    found, error = drain(write(ARRAY, "a.json"))
    assert ([turns(c) for c in found], error) == ([[("text", text)] for text in texts], None)


def test_a_file_of_whole_records_without_the_closing_bracket_counts_them_all(write):
    content = '[\n{"text": "a"},\n{"text": "b"}\n'
    found, error = drain(write(content, "a.json"))
    assert [turns(c) for c in found] == [[("text", "a")], [("text", "b")]]
    assert f"the file ends at byte {len(content)}, without its ], after 2 complete records" in error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=15,
)
fuzz = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(
    records=st.lists(st.dictionaries(st.text(max_size=6), JSON, max_size=4), max_size=5),
    chunk=st.sampled_from([1, 2, 3, 7, 64]),
    indent=st.sampled_from([None, 0, 1, "\t\r"]),
    ascii_=st.booleans(),
)
@settings(fuzz, max_examples=60)
def test_streaming_an_array_equals_json_load(write, records, chunk, indent, ascii_):
    path = write(json.dumps(records, indent=indent, ensure_ascii=ascii_), "a.json")
    with path.open("rb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK_BYTES", chunk)
        found = [record for _, record in reader.records(file, str(path))]
    assert found == json.loads(path.read_bytes())


def test_a_record_of_many_chunks_is_read_in_linear_work(write, monkeypatch):
    """The bytes that the scanner looks at stay a small multiple of the file's, though a record spans 4,000 chunks."""
    looked = 0

    class Counting:
        def finditer(self, buffer, start):
            nonlocal looked
            looked += len(buffer) - start
            return token.finditer(buffer, start)

    token = reader._TOKEN
    monkeypatch.setattr(reader, "_TOKEN", Counting())
    monkeypatch.setattr(reader, "CHUNK_BYTES", 100)
    path = write(json.dumps([{"text": "uzun \\ " * 50_000}, PAIR, {"text": "a"}]), "a.json")
    assert len(list(read(path))) == 3
    assert looked < 4 * path.stat().st_size


# ---- files that cannot be read ---------------------------------------------------------------------------------------


def test_files_that_cannot_be_opened_are_named(tmp_path, write):
    with pytest.raises(UserError, match=r"none\.json: No such file or directory \(remedy: name a file that can be"):
        list(read(tmp_path / "none.json"))
    with pytest.raises(UserError, match=rf"{tmp_path.name}: names no data file; there are none \(remedy: name a"):
        list(read(tmp_path))
    with pytest.raises(UserError, match=r"a\.log: unknown kind of file \(known: \.json, \.jsonl, .*rename the file if"):
        list(read(write("{}", "a.log")))


def test_damaged_gzip_files_are_named(write):
    packed = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(500)))
    flipped = packed[:200] + bytes([packed[200] ^ 0xFF]) + packed[201:]
    for content in (packed[:-20], packed[:5], flipped):
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged or cut-off gzip file: .*\(remedy: fetch the"):
            list(read(write(content, "a.jsonl.gz"), skip_bad=True))


# ---- nothing else ever comes out -------------------------------------------------------------------------------------


def check(path, **options):
    results, error = drain(path, **options)
    assert error is None or error.startswith(str(path))
    for found in results:
        assert isinstance(found, Conversation | Skipped)
        if isinstance(found, Conversation):
            roles = " ".join(turn.role for turn in found.turns)
            turn = r"(user (call result )*assistant )"
            assert roles == "text" or re.fullmatch(rf"(system )?{turn}*user (call result )*(assistant|call)", roles)
            assert all(turn.content.strip() for turn in found.turns)


KEYS = sorted({field for groups in FIELDS.values() for group in groups for field in group})
INNER = st.sampled_from(["role", "content", "from", "value", "text", "type", "weight", "replies", "rank", "output"])
NAMES = st.sampled_from([U, A, S, "human", "gpt", "text", "prompter", "tool", " ", "Merhaba"])
LIKELY = st.recursive(
    NAMES | st.none() | st.integers(-1, 2) | st.floats() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(INNER, inner, max_size=5),
    max_leaves=20,
)


@given(
    record=JSON | st.dictionaries(st.sampled_from(KEYS) | INNER, LIKELY | JSON, max_size=6),
    format=st.sampled_from(sorted(FIELDS)),
    oasst=st.sampled_from(["all", "best"]),
)
@fuzz
def test_any_json_value_as_a_record(write, record, format, oasst):
    if isinstance(record, dict):
        record = {**dict.fromkeys(FIELDS[format][0]), **record}
    path = write(json.dumps(record))
    check(path, format=format, skip_bad=True, oasst=oasst)
    check(path)


MARKS = st.sampled_from([b"[", b"]", b"{", b"}", b",", b'"', b"\\", b"\n", b":", GOOD, b"1", b" "])


@given(
    content=st.binary(max_size=60) | st.lists(MARKS, max_size=30).map(b"".join),
    name=st.sampled_from(["a.json", "a.jsonl", "a.txt", "a.json.gz"]),
    packed=st.booleans(),
    skip_bad=st.booleans(),
)
@fuzz
def test_any_bytes_as_a_file(write, content, name, packed, skip_bad):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK_BYTES", 3)
        check(write(gzip.compress(content) if packed else content, name), skip_bad=skip_bad)
