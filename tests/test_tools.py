"""Tools: calls are trained, definitions and results are not, and the ids are those of Llama-3.1's own template.

Oracles: texts written out by hand; transformers on the Jinja that is written for other programs; and, if TRL is
installed (the [bench] extra), transformers on the Llama-3.1 Jinja that comes with it.
"""

import importlib.util
import json
import os
import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from oracles.tiny_llama import write_tiny_llama
from small_data import documents_of, store_of
from transformers import PreTrainedTokenizerFast

from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation, Skipped, Turn
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.formats.jinja import written
from minisft.formats.parse import read

TEMPLATES = load_templates()
BOS = "<|begin_of_text|>"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
GIVEN = ("Given the following functions, please respond with a JSON for a function call with its proper arguments that "
         "best answers the given prompt.\n\nRespond in the format {\"name\": function name, \"parameters\": dictionary "
         "of argument name and its value}.Do not use variables.\n\n")
trl = importlib.util.find_spec("trl")
RELEASED = trl and (Path(trl.origin).parent / "chat_templates" / "llama3_1.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(TEMPLATES["llama3.1"], tokenizer)


@pytest.fixture
def one(tmp_path):
    """The single result of a single record."""
    def one(record):
        (tmp_path / "a.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        (found,) = read(tmp_path / "a.jsonl")
        return found

    return one


def rendered(renderer, found):
    assert renderer.renderable(found) is found, found
    return documents_of(renderer, [found])[0]


def trained_runs(renderer, ids, trained):
    runs = groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return [renderer.tokenizer.decode([token for token, _ in run]) for is_trained, run in runs if is_trained]


def theirs(renderer, jinja, messages, **options):
    """Token ids as transformers renders and encodes them, all at once."""
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(renderer.tokenizer.file), bos_token=BOS)
    text = hugging_face.apply_chat_template(messages, chat_template=jinja, tokenize=False, **options)
    return hugging_face.encode(text, add_special_tokens=False)


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def calling(name, arguments, **fields):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}], **fields}


def says(role, content):
    return {"role": role, "content": content}


WEATHER = {"type": "function", "function": {"name": "hava", "description": "Weather of a city, İğş",
                                            "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                                                           "required": []}}}
FLAT = {"name": "add", "parameters": {"a": 1.50, "b": [None, True, {}]}}
ASK, TELL = says("user", " Weather in Ağrı? "), says("assistant", "Cold.\n")
CALL = calling("hava", {"city": "Ağrı", "n": [1, 2.0, None, True], "s": "\"\n\u2028"})
RESULT = says("tool", '{"°C": -7, "s": "kar"}')

# messages, tools, built-in tools
CASES = {
    "a call, its result, an answer": ([ASK, CALL, RESULT, TELL], [WEATHER], []),
    "a system turn, and two tools": ([says("system", " Be brief. "), ASK, CALL, RESULT, TELL], [WEATHER, FLAT], []),
    "tools that are not called": ([ASK, TELL, ASK, TELL], [FLAT], []),
    "a call at the end": ([ASK, TELL, ASK, CALL], [WEATHER], []),
    "two calls one after another": ([ASK, CALL, RESULT, calling("add", {}), says("ipython", "3"), TELL], [FLAT], []),
    "calls without definitions": ([ASK, CALL, RESULT, TELL], [], []),
    "results of other kinds": ([ASK, CALL, says("tool", {"a": [1, "ğ"]}), TELL, ASK, CALL, says("tool", ""), TELL],
                               [FLAT], []),
    "built-in tools": ([ASK, calling("brave_search", {"query": 'a "b"', "n": ""}), RESULT, TELL], [],
                       ["brave_search", "wolfram_alpha", "code_interpreter"]),
    "built-in tools that are not called": ([ASK, TELL], [], ["wolfram_alpha"]),
    "code": ([ASK, calling("code_interpreter", {"code": "print(1)\n"}), RESULT, TELL], [], ["code_interpreter"]),
    "both kinds": ([says("system", "s"), ASK, CALL, RESULT, TELL, ASK, calling("brave_search", {"query": "x"})],
                   [WEATHER, FLAT], ["brave_search"]),
    "text beside a call": ([ASK, {**CALL, "content": "Let me see."}, RESULT, TELL], [WEATHER], []),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("jinja", ["written", pytest.param("released", marks=pytest.mark.skipif(
    RELEASED is None, reason="TRL is not installed"))])
def test_ids_are_those_of_transformers(renderer, one, case, jinja):
    messages, tools, builtin = CASES[case]
    found = one({"messages": messages, "tools": tools, "builtin_tools": builtin})
    options = {"tools": tools or None, **({"builtin_tools": builtin} if builtin else {})}
    jinja = written(renderer.template, renderer.fill) if jinja == "written" else RELEASED
    assert rendered(renderer, found)[0] == theirs(renderer, jinja, messages, **options)


def test_what_llama31_sees_and_which_of_it_is_trained(renderer, one):
    call = calling("hava", {"city": "Ağrı", "n": [1, 2.0, None, True], "s": "\"\n\u2028<|eom_id|>"})
    messages, tools = [says("system", " Be brief. "), ASK, call, RESULT, TELL], [{**WEATHER, "<|eot_id|>": BOS}, FLAT]
    ids, trained = rendered(renderer, one({"messages": messages, "tools": tools}))
    definitions = "".join(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tools)
    call = ('{"name": "hava", "parameters": {"city": "Ağrı", "n": [1, 2.0, null, true], '
            '"s": "\\"\\n\u2028<|eom_id|>"}}<|eot_id|>')
    assert renderer.tokenizer.decode(ids) == (
        f"{BOS}{header('system')}Environment: ipython\n{DATES}Be brief.<|eot_id|>"
        f"{header('user')}{GIVEN}{definitions}Weather in Ağrı?<|eot_id|>"
        f"{header('assistant')}{call}"
        f"{header('ipython')}" + r'"{\"°C\": -7, \"s\": \"kar\"}"' + "<|eot_id|>"
        f"{header('assistant')}Cold.<|eot_id|>")
    assert trained_runs(renderer, ids, trained) == [call, "Cold.<|eot_id|>"]
    assert sum(token in renderer.tokenizer.control.values() for token in ids) == 1 + 5 * 3


def test_built_in_tools_are_called_with_a_tag_and_wait_for_the_result(renderer, one):
    builtin = ["brave_search", "wolfram_alpha", "code_interpreter"]
    messages = [ASK, calling("brave_search", {"query": 'a "b"', "n": "<|eom_id|>"}), RESULT, TELL]
    ids, trained = rendered(renderer, one({"messages": messages, "builtin_tools": builtin}))
    call = '<|python_tag|>brave_search.call(query="a "b"", n="<|eom_id|>")<|eom_id|>'
    assert renderer.tokenizer.decode(ids).startswith(
        f"{BOS}{header('system')}Environment: ipython\nTools: brave_search, wolfram_alpha\n\n{DATES}<|eot_id|>"
        f"{header('user')}Weather in Ağrı?<|eot_id|>{header('assistant')}{call}{header('ipython')}")
    assert trained_runs(renderer, ids, trained) == [call, "Cold.<|eot_id|>"]
    control = renderer.tokenizer.control
    assert (ids.count(control["<|python_tag|>"]), ids.count(control["<|eom_id|>"])) == (1, 1)
    assert control["<|eom_id|>"] in renderer.stop_ids()


def test_train_on(tokenizer, one):
    messages, tools, _ = CASES["a call at the end"]
    found = one({"messages": messages, "tools": tools})
    last = Renderer(TEMPLATES["llama3.1"], tokenizer, train_on="last_assistant")
    assert [run[:16] for run in trained_runs(last, *rendered(last, found))] == ['{"name": "hava",']
    everything = Renderer(TEMPLATES["llama3.1"], tokenizer, train_on="all")
    ids, trained = rendered(everything, found)
    assert trained == [False] + [True] * (len(ids) - 1)
    weighed = [ASK, {**CALL, "weight": 0}, RESULT, TELL]
    found = one({"messages": weighed, "tools": tools})
    assert trained_runs(last, *rendered(last, found)) == ["Cold.<|eot_id|>"]
    assert all(run.startswith("<|start") for run in trained_runs(everything, *rendered(everything, found))[1:])


def test_every_way_of_writing_it_gives_the_same_conversation(one):
    arguments, result = {"city": "Ağrı"}, '{"°C": -7}'
    call = {"name": "hava", "arguments": arguments}
    talk = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": result}, {"from": "gpt", "value": "b"}]
    expected = one({"conversations": talk, "tools": json.dumps([FLAT])})
    assert expected.turns == (Turn("user", "a"), Turn("call", '{"city": "Ağrı"}', tool="hava"),
                              Turn("result", r'"{\"°C\": -7}"'), Turn("assistant", "b"))
    assert (expected.tools, expected.builtin_tools, expected.notes) == ((FLAT,), (), ())
    talk = [says("user", "a"), calling("hava", json.dumps(arguments), content=None), says("tool", result),
            says("assistant", "b")]
    legacy = [says("user", "a"), {**says("assistant", ""), "function_call": call}, says("function", result),
              says("assistant", "b")]
    for record in ({"messages": talk, "tools": [FLAT]}, {"messages": talk, "tools": json.dumps([FLAT])},
                   {"messages": legacy, "functions": [FLAT], "tools": None}):
        assert one(record) == expected
    found = one({"prompt": talk[:3], "completion": talk[3:], "tools": [FLAT]})
    assert found.turns == (*(replace(turn, trained=turn.role != "call") for turn in expected.turns[:3]),
                           expected.turns[3])


def sharegpt(*turns, **fields):
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **fields}


H, G, O = ("human", "a"), ("gpt", "b"), ("observation", "1")  # noqa: E741
F = ("function_call", '{"name": "f", "arguments": {}}')
DEEP = "[" * 10**5 + "]" * 10**5
FUNCTIONS = json.loads('{"function": ' * 600 + "1" + "}" * 600)


@pytest.mark.parametrize(("record", "reason"), [
    (sharegpt(H, O, G), "tool result without its call"),
    (sharegpt(O, G), "tool result without its call"),
    (sharegpt(H, F, O, O, G), "tool result without its call"),
    (sharegpt(H, F, G), "tool call without its result"),
    (sharegpt(H, F, H, G), "tool call without its result"),
    (sharegpt(H, F, O, H, G), "tool result without an answer"),
    (sharegpt(H, G, F, O, G), "an answer and a tool call in two turns"),
    (sharegpt(H, F, F, O, G), "neighbouring turns of one role"),
    (sharegpt(F, O, G), "starts with the assistant"),
    (sharegpt(H, ("observation", None), F), "tool result without its call"),
    (sharegpt(H, F, ("observation", None), G), "blank turn"),
    (sharegpt(H, ("function_call", f"[{F[1]}, {F[1]}]"), O, G), "several tool calls in one turn"),
    (sharegpt(H, ("function_call", '{"name": "f", "arguments": {"a": 1, "a": 2}}'), O, G), "bad tool call"),
    *((sharegpt(H, ("function_call", value), O, G), "bad tool call") for value in (
        None, "", "f()", 3, "[]", "{}", '{"name": "f", "args": {"a": 1}}', '{"name": "f", "arguments": [1]}',
        '{"name": " ", "arguments": {}}',
        '{"name": 3, "arguments": {}}', '{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}', '{"name": "f", "arguments": {"a": ' + DEEP + "}}",
        '{"function": {"function": 1}}', "1" * 5000)),
    *((sharegpt(H, ("function_call", value), O, G), "half of a surrogate pair in JSON text") for value in (
        r'{"name": "f", "arguments": {"a": "\ud800"}}', r'{"name": "\ud800", "arguments": {}}')),
    (sharegpt(H, G, tools=r'[{"name": "\ud800"}]'), "half of a surrogate pair in JSON text"),
    *((sharegpt(H, G, tools=tools), "bad tools") for tools in (
        "none", 3, "3", {"name": "f"}, ["f"], DEEP, '[{"a": ' + DEEP + "}]", [FUNCTIONS],
        '[{"a": NaN}]')),
    (sharegpt(H, G, builtin_tools="brave_search"), "bad tools"),
    (sharegpt(H, G, builtin_tools=[1]), "bad tools"),
    ({"messages": [ASK, {**CALL, "content": 7}]}, "answer is not text"),
])
def test_what_is_skipped(one, record, reason):
    found = one(record)
    assert isinstance(found, Skipped), found
    assert found.reason == reason


def test_nesting_that_could_overflow_the_stack_is_skipped(renderer, one):
    for depth, deep in ((60, False), (70, True), (900, True)):
        nested = json.loads('{"a": ' * depth + "1" + "}" * depth)
        for record in (sharegpt(H, G, tools=[nested]), {"messages": [ASK, calling("f", nested)]}):
            found = one(record)
            assert isinstance(found, Skipped) == deep
            assert deep or rendered(renderer, found)


def test_text_beside_a_call_is_noted(one):
    found = one({"messages": [ASK, {**CALL, "content": "Let me see."}, RESULT, TELL]})
    assert found.notes == ("text beside a tool call dropped",)


# Templates and tools

@pytest.mark.parametrize("name", ["llama3", "alpaca", "text"])
@pytest.mark.parametrize(("record", "detail"), [
    (sharegpt(H, G, tools=[FLAT]), "add"), (sharegpt(H, F, O, G), "f"), (sharegpt(H, G, builtin_tools=["x"]), "x")])
def test_a_template_that_does_not_know_tools_leaves_such_a_conversation_out(tokenizer, one, name, record, detail):
    renderer, plain = Renderer(TEMPLATES[name], tokenizer), one(sharegpt(H, G))
    assert renderer.renderable(plain) is plain
    skipped = renderer.renderable(found := one(record))
    assert skipped == Skipped(f"tools, which template {name} does not know", skipped.detail, found.source, 1)
    assert detail in skipped.detail
    assert renderer.renderable(skipped) is skipped


def test_a_store_counts_what_its_template_does_not_know(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in (sharegpt(H, G), sharegpt(H, F, O, G))))
    for name, kept in (("llama3", 1), ("llama3.1", 2)):
        report = store_of(file, Renderer(TEMPLATES[name], tokenizer), tmp_path / "cache").report
        assert (report.read, report.kept) == (2, kept)
        assert report.skipped == ({"tools, which template llama3 does not know": 1} if name == "llama3" else {})


def test_built_in_tools_take_text_and_need_their_tokens(renderer, tmp_path, one):
    found = one(sharegpt(H, ("function_call", '{"name": "f", "arguments": {"n": 3}}'), builtin_tools=["f"]))
    assert renderer.renderable(found).reason == "an argument of a built-in tool is not text"
    folder = write_tiny_llama(tmp_path / "tiny")
    content = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|python_tag|>", "<|other|>")
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    llama30 = Renderer(TEMPLATES["llama3.1"], Tokenizer(folder))
    assert llama30.renderable(found).reason == "built-in tools, which template llama3.1 does not know"
    assert "python_tag" not in written(llama30.template, llama30.fill)
    plain = one(sharegpt(H, F, O, G, tools=[FLAT]))
    assert rendered(llama30, plain)[0] == rendered(renderer, plain)[0]


MINE = """
[mine]
begin = "{bos}"
system = ["S: ", "\\n"]
user = ["U: ", "\\n"]
assistant = ["A:\\n", "<|eot_id|>", "\\n"]
call = "<|python_tag|>{arguments} to {name}!{name}"
result = ["R: ", "\\n"]
tools_user = ["(", ") "]
"""


def test_a_template_of_ones_own_with_tools(tokenizer, tmp_path, one):
    (tmp_path / "t.toml").write_text(MINE)
    renderer = Renderer(load_templates(tmp_path / "t.toml")["mine"], tokenizer)
    messages = [says("user", "q"), calling("{arguments}", {"a": "{name}<|python_tag|>"}), says("tool", "1"),
                says("assistant", "b")]
    ids, trained = rendered(renderer, one({"messages": messages, "tools": [{"x": 1}, {}]}))
    call = '<|python_tag|>{"a": "{name}<|python_tag|>"} to {arguments}!{arguments}<|eot_id|>'
    assert renderer.tokenizer.decode(ids) == (
        f'{BOS}U: ({{\n    "x": 1\n}}) {{}}) q\nA:\n{call}\nR: "1"\nA:\nb<|eot_id|>\n')
    assert trained_runs(renderer, ids, trained) == [call, "b<|eot_id|>"]
    messages[1] = calling("f", {"a": "ğ"})
    ids, _ = rendered(renderer, one({"messages": messages, "tools": [FLAT]}))
    for arguments in ({"a": "ğ"}, '{"a": "ğ"}'):
        messages[1] = calling("f", arguments)
        assert ids == theirs(renderer, written(renderer.template, renderer.fill), messages, tools=[FLAT])


@pytest.mark.parametrize(("toml", "message"), [
    ('call = "{name}"', "call: must contain {name} and {arguments}; found '{name}'"),
    ('call = "{name}{arguments}"', ": result, tools_user missing"),
    ('result = ["", ""]', ": call, tools_user missing"),
    ('tools_system = "x"', ": call, result, tools_user missing"),
    ('builtin_stop = "x"', ": call, result, tools_user, builtin_system, builtin_call missing"),
    ('call = "{name}{arguments}"\nresult = ["", ""]\ntools_user = ["", ""]\ntools_system = "x"',
     ": default_system missing: the system turn, which describes the tools, must be there"),
])
def test_mistakes_in_templates(tmp_path, monkeypatch, toml, message):
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(f'[a]\nsystem = ["", ""]\nuser = ["", ""]\nassistant = ["", "{{eos}}"]\n{toml}')
    with pytest.raises(UserError, match=re.escape(f"t.toml: [a]{'' if message[0] == ':' else ' '}{message}")):
        load_templates("t.toml")


# Real data: MINISFT_DATA names a folder with llama3_tokenizer/ and sft/

@pytest.mark.skipif("MINISFT_DATA" not in os.environ, reason="MINISFT_DATA names no folder")
@pytest.mark.parametrize("jinja", ["written", pytest.param("released", marks=pytest.mark.skipif(
    RELEASED is None, reason="TRL is not installed"))])
def test_every_real_conversation_with_tools_as_transformers_renders_it(jinja):
    data = Path(os.environ["MINISFT_DATA"])
    renderer = Renderer(TEMPLATES["llama3.1"], Tokenizer(data / "llama3_tokenizer"))
    jinja = written(renderer.template, renderer.fill) if jinja == "written" else RELEASED
    file = data / "sft" / "sharegpt_toolcall_300.json"
    records, real = json.loads(file.read_text(encoding="utf-8")), list(read(file))
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(renderer.tokenizer.file), bos_token=BOS)
    roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
    calls = 0
    for record, found in zip(records, real, strict=True):
        assert isinstance(found, Conversation), found
        messages, answers = [], []
        for turn in record["conversations"]:
            if turn["from"] == "function_call":
                call = json.loads(turn["value"])
                messages.append({"role": "assistant", "tool_calls": [{"function": call}]})
                arguments = json.dumps(call["arguments"], ensure_ascii=False)
                answers.append('{"name": "%s", "parameters": %s}<|eot_id|>' % (call["name"], arguments))  # noqa: UP031
                calls += 1
            else:
                messages.append(says(roles[turn["from"]], turn["value"]))
                answers += [turn["value"].strip() + "<|eot_id|>"] * (turn["from"] == "gpt")
        ids, trained = rendered(renderer, found)
        text = hugging_face.apply_chat_template(messages, tools=json.loads(record["tools"]) or None,
                                                chat_template=jinja, tokenize=False)
        assert ids == hugging_face.encode(text, add_special_tokens=False), found.line
        assert trained_runs(renderer, ids, trained) == answers
    assert (len(real), calls) == (300, 211)
