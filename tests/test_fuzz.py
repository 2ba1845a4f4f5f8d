"""Reading and rendering any file ends in conversations, counted reasons or a UserError. Rendered control tokens come
from the template, the text is the conversation's, and nothing is trained on except an assistant's words in the record.

Three oracles, independent of the renderer: `segments` writes a conversation out by hand, with its mask; `said`
looks for an assistant's words in the raw JSON; the tokenizer's decoder gives the text back.
"""

import json
import os
import random
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.tiny_llama import tiny_tokenizer, write_tiny_llama
from small_data import documents_of

from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation, Skipped
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.formats.parse import FIELDS, read

CONTROL = ("<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<|im_end|>", "<|im_start|>",
           "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|end_of_text|>")
STRANGE = (*CONTROL, "{bos}", "{eos}", "{content}", "{context}", "{name}", "{arguments}", "{{ 1 }}", "\\1", "\\ud800",
           "\x00", "\u2028", "\x85", "\ufeff", "\u200d", "e\u0301", "\U0001f642", "ğİı", "\n\n", "\r", " ",
           "\x1c", "\"", "'")


# ---- the oracles -----------------------------------------------------------------------------------------------------

DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
GIVEN = ("Given the following functions, please respond with a JSON for a function call with its proper arguments that "
         "best answers the given prompt.\n\nRespond in the format {\"name\": function name, \"parameters\": dictionary "
         "of argument name and its value}.Do not use variables.\n\n")
BELOW = "Below is an instruction that describes a task"
WITH = ", paired with an input that provides further context"
COMPLETES = ". Write a response that appropriately completes the request."
PLAIN = {"chatml": ("", "<|im_end|>"), "alpaca": ("<|begin_of_text|>", "<|eot_id|>"),
         "text": ("<|begin_of_text|>", "<|eot_id|>"), "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
         "llama3.1": ("<|begin_of_text|>", "<|end_of_text|>")}


def segments(name, found, train_on):
    """The conversation as [text, is it one control token, its weight in the loss], in order."""
    parts, every, turns = [], found.weight * (train_on == "all"), list(found.turns)
    begin, end = PLAIN[name]
    if begin:
        parts.append([begin, True, False])
    if turns[0].role == "text":
        return [*parts, [turns[0].content, False, found.weight], [end, True, found.weight]]
    spoken = [i for i, turn in enumerate(turns) if turn.role in ("assistant", "call")]
    first_user = next(i for i, turn in enumerate(turns) if turn.role == "user")
    systems = {"llama3.1": "", "alpaca": BELOW + (WITH if turns[0].context else "") + COMPLETES}
    if name in systems and turns[0].role != "system":
        parts += role_segments(name, found, "system", systems[name], "", every, every)
    for i, turn in enumerate(turns):
        around = every * turn.trained
        is_trained = i in spoken and (train_on == "assistant" or i == spoken[-1])
        inside = around or found.weight * turn.trained * is_trained
        content = turn.content
        if turn.context and turn.role == "user":
            content += ("\n\n### Input:\n" if name == "alpaca" else "\n") + turn.context
        parts += role_segments(name, found, turn.role, content, turn.tool, around, inside, first=i == first_user)
    return parts


def role_segments(name, found, role, content, tool, around, inside, first=False):
    if name == "chatml":
        return [["<|im_start|>", True, around], [f"{role}\n", False, around], [content, False, inside],
                ["<|im_end|>", True, inside if role == "assistant" else around],
                ["\n", False, around]]
    if name in ("alpaca", "text"):
        if role == "assistant":
            return [[content, False, inside], ["<|eot_id|>", True, inside]]
        if role == "user" and name == "alpaca":
            content = f"\n\n### Instruction:\n{content}\n\n### Response:\n"
        return [[content, False, around]]
    content, before, stop = content.strip(), "", "<|eot_id|>"
    builtin = found.builtin_tools
    if role == "system" and name == "llama3.1":
        environment = "Environment: ipython\n" if found.tools or builtin else ""
        names = "Tools: " + ", ".join(n for n in builtin if n != "code_interpreter") + "\n\n" if builtin else ""
        before = environment + names + DATES
    if first and found.tools:
        before = GIVEN + "".join(json.dumps(t, ensure_ascii=False, indent=4) + "\n\n" for t in found.tools)
    tag = []
    if role == "call":
        if tool in builtin:
            tag = [["<|python_tag|>", True, inside]]
            pairs = ", ".join(f'{key}="{value}"' for key, value in json.loads(content).items())
            content = f"{tool}.call({pairs})"
        else:
            content = '{"name": "' + tool + '", "parameters": ' + content + "}"
        stop = "<|eom_id|>" if builtin else stop
    header = {"call": "assistant", "result": "ipython"}.get(role, role)
    return [["<|start_header_id|>", True, around], [header, False, around], ["<|end_header_id|>", True, around],
            ["\n\n", False, around], *tag, [before + content, False, inside], [stop, True, inside]]


def said(record):
    """Every text in a raw record that an assistant says, and every call as Llama-3.1 writes it; users' words never."""
    found, stack = set(), [record]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        if not isinstance(value, dict):
            continue
        stack += value.values()
        roles = [role for role in (value.get("from"), value.get("role")) if isinstance(role, str)]
        texts = [value.get(key) for key in ("output", "response", "completion")]
        if isinstance(value.get("history"), list):
            texts += [pair[1] for pair in value["history"] if isinstance(pair, list) and len(pair) == 2]
        if {"gpt", "assistant", "chatgpt", "bing", "bard"}.intersection(roles):
            texts += [value.get(key) for key in ("content", "value", "text")]
            for calls in (value.get("tool_calls"), value.get("function_call")):
                found |= written_calls(calls)
        if {"function_call", "tool_call"}.intersection(roles):
            found |= written_calls(value.get("value")) | written_calls(value.get("content"))
        for text in texts:
            if isinstance(text, list):
                parts = [part.get("text", part.get("value")) for part in text if isinstance(part, dict)]
                text = "".join(part for part in parts if isinstance(part, str))
            if isinstance(text, str):
                found |= {text, text.strip()}
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        found.add(record["text"])
    return found


def without_nulls(value):
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def written_calls(value):
    try:
        value = json.loads(value) if isinstance(value, str) else value
        call = value[0] if isinstance(value, list) else value
        call = call.get("function", call)
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            arguments = json.loads(arguments) if arguments.strip() else {}
        arguments = without_nulls(arguments or {})
        pairs = ", ".join(f'{key}="{item}"' for key, item in arguments.items())
        return {'{"name": "' + call["name"] + '", "parameters": ' + json.dumps(arguments, ensure_ascii=False) + "}",
                f"{call['name']}.call({pairs})"}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return set()


# ---- the laws --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renderers(tmp_path_factory):
    """For each template, a renderer for each value of train_on."""
    llama, chatml = (tmp_path_factory.mktemp(name) for name in ("llama", "chatml"))
    write_tiny_llama(llama)
    backend = tiny_tokenizer()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    content = {**json.loads(backend.to_str()), "post_processor": None}
    (chatml / "tokenizer.json").write_text(json.dumps(content))
    (chatml / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizers = {name: Tokenizer(chatml if name == "chatml" else llama) for name in PLAIN}
    return [Renderer(template, tokenizers[name], train_on=train_on) for name, template in load_templates().items()
            for train_on in ("assistant", "last_assistant", "all")]


def hold(renderer, results, raw):
    """Check every conversation of `results`. `raw`: line -> record, for those lines that hold a whole one.

    Returns how many were rendered, and how many of these could be held against their raw record.
    """
    name, tokenizer = renderer.template.name, renderer.tokenizer
    control = set(tokenizer.control.values())
    fit = [found for found in map(renderer.renderable, results) if isinstance(found, Conversation)]
    compared = 0
    for found, (ids, trained) in zip(fit, documents_of(renderer, fit), strict=True):
        expected = segments(name, found, renderer.train_on)
        assert tokenizer.decode(ids) == "".join(text for text, _, _ in expected)
        assert [tokenizer.decode([t]) for t in ids if t in control] == [text for text, alone, _ in expected if alone]
        plain = [t for t in ids if t not in control]
        assert tokenizer.decode(plain) == "".join(text for text, alone, _ in expected if not alone)
        assert trained[0] == 0  # nothing comes before it that could predict it
        trained[0] = expected[0][2]
        runs = [(mask, tokenizer.decode([token for token, _ in run]))
                for mask, run in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])]
        assert runs == [(mask, "".join(text for text, _, _ in run)) for mask, run in
                        groupby([part for part in expected if part[0]], key=lambda part: part[2])]
        if renderer.train_on != "all" and found.line in raw:
            words = said(raw[found.line])
            for mask, run in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
                text = tokenizer.decode([token for token, _ in run if token not in control])
                assert not mask or text in words, f"{found} from {raw[found.line]}"
            compared += 1
    return len(fit), compared


def read_all(path, **options):
    """The results before the end or the error; any exception except UserError fails the test."""
    results = []
    with suppress(UserError):
        for found in read(path, **options):
            assert isinstance(found, Conversation | Skipped)
            results.append(found)
    return results


def raw_records(content):
    """line -> record, for each line that is a whole record by itself or with the comma of its array."""
    records = {}
    for line, text in enumerate(content.split(b"\n"), 1):
        try:
            records[line] = json.loads(text.strip(b" \t\r,").decode("utf-8"))
        except (ValueError, RecursionError):
            continue
    return records


# ---- any value -------------------------------------------------------------------------------------------------------

TEXT = st.lists(st.sampled_from(STRANGE) | st.text(max_size=6), min_size=1, max_size=4).map("".join)
LONE = st.sampled_from(["\ud800", "a\udfff"])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT | LONE,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)
ARGUMENTS = st.dictionaries(TEXT, TEXT | JSON, max_size=2)
CALLS = st.fixed_dictionaries({"name": TEXT, "arguments": ARGUMENTS | ARGUMENTS.map(json.dumps) | JSON})
TOOLS = st.lists(st.dictionaries(TEXT, JSON, max_size=2), max_size=2)


@st.composite
def talks(draw):
    """Mostly well-formed: turns in order, of which any part may be anything."""
    turns, odd = [], st.integers(0, 19).map(lambda n: n == 7)
    content = JSON if draw(odd) else TEXT
    if draw(st.booleans()):
        turns.append(("system", draw(content)))
    if draw(odd):
        turns.append(("assistant", draw(content)))
    for _ in range(draw(st.integers(1, 3))):
        turns.append(("user", draw(content)))
        while draw(st.integers(0, 3)) == 0:
            turns += [("call", draw(CALLS)), ("result", draw(JSON if draw(st.booleans()) else TEXT))]
        turns.append(("assistant", draw(content)))
    if draw(odd):
        del turns[draw(st.integers(0, len(turns) - 1))]
    return turns


WEIGHT = st.sampled_from([0, 1, 0.5, 2.5, True, "1", "0.5", -1, None])


@st.composite
def records_of_talk(draw):
    turns = draw(talks())
    if draw(st.booleans()):
        roles = {"user": "human", "assistant": "gpt", "call": "function_call", "result": "observation"}
        record = {"conversations": [{"from": roles.get(role, role),
                                     "value": json.dumps(value) if role == "call" else value} for role, value in turns]}
    else:
        record = {"messages": [
            {"role": "assistant", "content": draw(st.none() | TEXT), "tool_calls": [{"function": value}]}
            if role == "call" else {"role": "tool" if role == "result" else role, "content": value}
            for role, value in turns]}
    for turn in next(iter(record.values())):
        if draw(st.integers(0, 9)) == 0:
            turn["weight"] = draw(WEIGHT)
    if draw(st.integers(0, 4)) == 0:
        record["weight"] = draw(WEIGHT)
    if draw(st.booleans()):
        record["tools"] = draw(TOOLS | TOOLS.map(json.dumps) | JSON)
    if draw(st.integers(0, 3)) == 0:
        names = [value["name"] for role, value in turns if role == "call"]
        record["builtin_tools"] = draw(st.just([*names, "code_interpreter"]) | JSON)
    return record


@st.composite
def other_records(draw):
    format = draw(st.sampled_from(sorted(FIELDS)))
    value = TEXT | JSON if draw(st.integers(0, 3)) == 0 else TEXT
    match format:
        case "alpaca":
            return draw(st.fixed_dictionaries({"instruction": value, "output": value},
                                              optional={"input": value, "system": value,
                                                        "history": st.lists(st.lists(value, min_size=2, max_size=2))}))
        case "dolly":
            return draw(st.fixed_dictionaries({"instruction": value, "response": value}, optional={"context": value}))
        case "text":
            return {"text": draw(value)}
        case "prompt_completion":
            return {"prompt": draw(value), "completion": draw(value)}
        case "oasst":
            node = {"text": value, "role": st.sampled_from(["assistant", "prompter"])}
            replies = st.recursive(st.fixed_dictionaries(node), lambda inner: st.fixed_dictionaries(
                {**node, "replies": st.lists(inner, max_size=2)}), max_leaves=4)
            return {"message_tree_id": "1", "prompt": {"text": draw(value), "role": "prompter",
                                                       "replies": draw(st.lists(replies, max_size=2))}}
    return draw(st.dictionaries(TEXT, JSON, max_size=3))


@given(st.lists(records_of_talk() | other_records(), min_size=1, max_size=3), st.booleans(), st.integers(0, 2))
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_any_record(renderers, tmp_path_factory, records, skip_bad, which):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    content = "\n".join(map(json.dumps, records)).encode()
    path.write_bytes(content)
    results = read_all(path, skip_bad=skip_bad)
    for renderer in renderers[which::3]:
        hold(renderer, results, raw_records(content))


# ---- mutated copies --------------------------------------------------------------------------------------------------


def talk(*pairs, **fields):
    return {"conversations": [{"from": role, "value": value} for role, value in pairs], **fields}


CALL = '{"name": "hava", "arguments": {"city": "Ağrı", "days": [1, 2]}}'
FIXTURES = [
    [{"instruction": "Özetle:", "input": "Uzun bir metin.", "output": "Kısa."},
     {"instruction": "Say hi", "output": " Hi!\n", "system": "Be kind.", "history": [["Who?", "Me."], ["Y?", "O."]]}],
    [{"instruction": "Kim?", "context": "Ali geldi.", "response": "Ali", "category": "qa"}],
    [talk(("human", "Borsa nedir?"), ("gpt", "Bir pazar."), ("human", "Neden düştü?"), ("gpt", "Korkudan 📉"),
          system="Kısa yaz."),
     talk(("gpt", "Welcome."), ("human", "Hello?"), ("gpt", "Yes?"), ("human", "Nothing."))],
    [talk(("human", "Weather?"), ("function_call", CALL), ("observation", '{"t": -7}'), ("gpt", "Cold."),
          ("human", "Thanks"), ("gpt", "Welcome."), ("human", "Again!"), ("function_call", CALL),
          tools='[{"name": "hava", "parameters": {"a": {"b": []}}}]')],
    [{"messages": [{"role": "system", "content": "Be brief."},
                   {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
                   {"role": "assistant", "content": "4", "weight": 0}, {"role": "user", "content": "Sure?"},
                   {"role": "assistant", "content": "Yes.", "weight": 1}]},
     {"messages": [{"role": "user", "content": "Search!"},
                   {"role": "assistant", "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "brave_search",
                                                                     "arguments": '{"query": "kar"}'}}]},
                   {"role": "tool", "content": "snow"}, {"role": "assistant", "content": "It snows."}],
      "builtin_tools": ["brave_search", "code_interpreter"], "tools": [{"name": "f", "description": "d"}]}],
    [{"prompt": "### Soru:\n x \n\n", "completion": " y"}],
    [{"prompt": [{"role": "user", "content": "a?"}], "completion": [{"role": "assistant", "content": "b."}]}],
    [{"message_tree_id": "t", "prompt": {"text": "q?", "role": "prompter", "replies": [
        {"text": "a1.", "role": "assistant", "rank": 1, "replies": [
            {"text": "q2?", "role": "prompter", "replies": [{"text": "a2.", "role": "assistant", "replies": []}]}]},
        {"text": "a3.", "role": "assistant", "rank": 0, "deleted": False, "replies": []}]}}],
    [{"text": "Bir belge.\nİki satır."}],
]


def mutated_value(rng, value):
    """A copy of a JSON value, changed at one place of it."""
    value, places = json.loads(json.dumps(value)), []
    stack = [value]
    while stack:
        inner = stack.pop()
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        places += [(inner, key) for key in keys]
        stack += [inner[key] for key in keys]
    holder, key = rng.choice(places)
    old, strange = holder[key], "".join(rng.choices(STRANGE, k=3))
    change = rng.choice(["drop", "type", "nest", "insert", "insert", "insert", "double", "rename", "swap"])
    if change == "drop":
        del holder[key]
    elif change == "type":
        holder[key] = rng.choice([None, True, 0, -1.5, 10**30, "", " \n", strange, [], {}, [old], {"text": old}])
    elif change == "nest":
        for _ in range(rng.choice([1, 2, 80, 300])):
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"content": holder[key]}
    elif change == "insert" and isinstance(old, str):
        at = rng.randint(0, len(old))
        holder[key] = old[:at] + strange + old[at:]
    elif change == "double" and isinstance(holder, list):
        holder.insert(rng.randint(0, len(holder)), old)
    elif change == "rename" and isinstance(holder, dict):
        holder[rng.choice(["from", "role", "content", "value", "text", "tools", "weight", strange])] = holder.pop(key)
    elif change == "swap":
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    return value


def mutated_bytes(rng, content):
    for _ in range(rng.choice([1, 1, 3])):
        at, size = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 10, 100])
        change = rng.choice(["delete", "double", "replace", "insert", "mark", "cut"])
        if change == "delete":
            content = content[:at] + content[at + size :]
        elif change == "double":
            content = content[: at + size] + content[at:]
        elif change == "replace":
            content = content[:at] + rng.randbytes(size) + content[at + size :]
        elif change == "insert":
            strange = rng.choice(STRANGE).encode()
            content = content[:at] + strange + content[at:]
        elif change == "mark":
            marks = (b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"\n", b"\\ud800", b"\\u0000", b"\xff", b"NaN", b"\\")
            content = content[:at] + rng.choice(marks) + content[at:]
        elif rng.random() < 0.2:
            content = content[:at]
    return content


def fuzz(renderers, path, sources, copies, seed):
    """Read and render `copies` mutated copies of some records of `sources`; returns how many held each law."""
    rng, rendered, compared = random.Random(seed), 0, 0
    for copy in range(copies):
        records = rng.choice(sources)
        records = [rng.choice(records) for _ in range(rng.randint(1, 3))]
        if kind := rng.randrange(3):
            records = [mutated_value(rng, record) if rng.random() < 0.7 else record for record in records]
        lines = [json.dumps(record, ensure_ascii=rng.random() < 0.2) for record in records]
        array = rng.random() < 0.5
        content = ("[\n" + ",\n".join(lines) + "\n]" if array else "\n".join(lines)).encode("utf-8", "surrogatepass")
        if kind != 1:
            content = mutated_bytes(rng, content)
        path.write_bytes(content)
        results = read_all(path, skip_bad=rng.random() < 0.7, oasst=rng.choice(["all", "best"]))
        for renderer in renderers[copy % 3 :: 3]:
            fit, held = hold(renderer, results, raw_records(content))
            rendered, compared = rendered + fit, compared + held
    return rendered, compared


def test_mutated_copies(renderers, tmp_path):
    rendered, compared = fuzz(renderers, tmp_path / "a.json", FIXTURES, copies=400, seed=0)
    assert rendered > 1500
    assert compared > 700


@pytest.mark.slow
@pytest.mark.skipif("MINISFT_DATA" not in os.environ, reason="MINISFT_DATA names no folder")
def test_mutated_copies_of_real_files(renderers, tmp_path):
    sources = []
    for file in sorted((Path(os.environ["MINISFT_DATA"]) / "sft").iterdir()):
        text = file.read_text(encoding="utf-8")
        records = json.loads(text) if text.lstrip()[0] == "[" else list(map(json.loads, filter(None, text.split("\n"))))
        sources.append([record for record in records if len(json.dumps(record)) < 20_000])
    rendered, compared = fuzz(renderers, tmp_path / "a.json", sources, copies=2000, seed=1)
    print(f"{rendered} renderings, {compared} held against their record")
    assert rendered > 6000
    assert compared > 3000
