"""Jinja, the template language of other programs: looked at and written, never executed.

A model's own Jinja is recognised where it stands for one of our templates. For the programs that serve a trained model
(transformers, vLLM) the template is written as Jinja, which gives the token ids that the model was trained on.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from minisft.data.conversation import Turn
from minisft.data.formats import ROLES
from minisft.data.templates import Template
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError


def choose_template(name: str, known: dict[str, Template], tokenizer: Tokenizer, *,
                    option: str = "data.template") -> Template:
    """The template called `name`; without a name, the one that the tokenizer's folder says.

    Raises UserError if there is no such template. The user chooses with `option`; the same option with an s names a
    file of the user's own templates.
    """
    choices = f"choose with {option}: {', '.join(known)}; or write your own and name its file in {option}s"
    if name:
        if name not in known:
            raise UserError(f"{option}: no template is called {name!r}; {choices}")
        return known[name]
    jinja, folder = tokenizer.chat_template, tokenizer.file.parent
    if jinja is None:
        raise UserError(f"{folder}: does not say which chat template the model uses; {choices}")
    found = recognize(jinja)
    begins = found is not None and found[0] == "chatml" and begins_with_bos(jinja)
    if found is None or (begins and not tokenizer.bos_token):
        raise UserError(f"{folder}: the model's own chat template is none of these, and another one would teach it "
                        f"other tokens than it knows; {choices}")
    template = replace(known[found[0]], default_system=found[1])
    return replace(template, begin=tokenizer.bos_token) if begins else template


def recognize(jinja: object) -> tuple[str, str | None] | None:
    """The template's name and default system text that a model's own Jinja stands for; None where it is unknown.

    The Jinja is looked at, not executed. One that does more than our templates is unknown: it reasons, puts a system
    text into a variable, does not trim as Llama-3 does, or puts a token of its own elsewhere than at the beginning of
    ChatML. Every pattern takes time in proportion to the text.
    """
    if not isinstance(jinja, str) or "<think>" in jinja:
        return None
    if any("system" in name for name in re.findall(r"set\s++(\w++)\s*+=\s*+(?!''|\"\")['\"]", jinja)):
        return None
    header, line = r"<\|start_header_id\|>{}<\|end_header_id\|>(?:\\n|\n){{2}}", r"<\|im_start\|>{}(?:\\n|\n)"
    try:
        if re.search(header.format("assistant"), jinja) and re.search(r"\|\s*+trim", jinja):
            if "Cutting Knowledge Date" in jinja:
                return "llama3.1", ""
            return "llama3", _default_system(jinja, header.format("system"), "<|eot_id|>")
        if re.search(line.format("assistant"), jinja) and jinja.count("bos_token") == begins_with_bos(jinja):
            return "chatml", _default_system(jinja, line.format("system"), "<|im_end|>")
    except UnicodeError:  # a \\x without its digits, half of a surrogate pair
        pass
    return None


def begins_with_bos(jinja: str) -> bool:
    """Whether the Jinja writes the tokenizer's BOS token before all else, and no white space after it."""
    return bool(re.match(r"\s*+\{\{-?\s*+bos_token\s*+(-\}\}|\}\}(?=\{))", jinja))


def _default_system(jinja: str, before: str, after: str) -> str | None:
    """The system text that stands between a pattern and `after` in a string of the Jinja, or outside of any {{ }}."""
    for string in re.finditer(rf"(['\"]){before}((?:\\.|(?!\1)[^\\])*+)", jinja, re.DOTALL):
        text, found, _ = string[2].partition(after)
        if found and text:
            text = text.encode("ascii", "backslashreplace").decode("unicode-escape")  # as Jinja reads a string
            text.encode()  # half of a surrogate pair is no text
            return text
    for chunk in re.split(r"[{}]", jinja):
        start = re.search(rf"(?:^|\n){before}", chunk)
        text, found, _ = chunk[start.end() :].partition(after) if start else ("", "", "")
        if found and text:
            return text
    return None


def written(template: Template, fill: Callable[[str], str]) -> str:
    """The template as Jinja. `fill` puts the tokenizer's tokens for {bos} and {eos}.

    It takes `messages`, `add_generation_prompt`, and what Llama-3.1's own takes for tools: `tools`, `builtin_tools`,
    messages with `tool_calls`, and results. Roles have the names that training accepts, except those of a turn that
    is a call as text, and content may be a list of texts as there; it raises where it would leave out something else.
    """
    def text(marker: str) -> str:
        escaped = fill(marker).replace("\\", "\\\\").replace("'", "\\'")
        escaped = escaped.replace("\n", "\\n").replace("\r", "\\r")  # Jinja would read a bare \r as \n
        return f"{{{{- '{escaped}' }}}}" if marker else ""

    content = _if("content is not string", _raise("'content is not text'"))
    content += "{{- content | trim }}" if template.trim else "{{- content }}"
    names = {role: [name for name, own in ROLES.items() if own == role] for role in ROLES.values()}
    system = text(template.system[0]) + _environment(template, text) + text(template.system_prefix)
    answer, stop, after = map(text, template.assistant)
    branches = {f"message['role'] in {names['system']}": system + content + text(template.system[1])}
    user = text(template.user[0])
    unknown = "builtin_tools" if template.call else "tools or builtin_tools or message['tool_calls']"
    unknown = "" if template.builtin_call else _if(unknown, _raise("'this template does not know these tools'"))
    if template.call:
        branches["message['tool_calls']"] = answer + _call(template, text, stop) + after
        branches[f"message['role'] in {names['result']}"] = (
            text(template.result[0]) + "{{- content | tojson }}" + text(template.result[1]))
        first = f"loop.first or loop.index0 == 1 and messages[0]['role'] in {names['system']}"
        definition = text(template.tools_user[0]), "{{- tool | tojson(indent=4) }}" + text(template.tools_user[1])
        user += _if(f"tools and ({first})", f"{definition[0]}{{%- for tool in tools %}}{definition[1]}{{%- endfor %}}")
    branches[f"message['role'] in {names['user']}"] = user + content + text(template.user[1])
    branches[f"message['role'] in {names['assistant']}"] = answer + content + stop + after
    default = ""
    if template.default_system is not None:
        default = template.content(Turn("system", template.default_system)).removeprefix(template.system_prefix)
        default = system + text(default) + text(template.system[1])
        default = _if(f"messages[0]['role'] not in {names['system']}", default)
    otherwise = _raise("'this template does not know the role ' ~ message['role']")
    jinja = (text(template.begin) + default + "{%- for message in messages %}" + CONTENT + unknown
             + _choice(branches, otherwise) + "{%- endfor %}" + _if("add_generation_prompt", answer))
    return jinja.replace("' }}{{- '", "")  # two strings in a row are one; a quote inside of a string is \\'


CONTENT = ("{%- set content = message['content'] %}{%- if content is defined and content is sequence and content is "
           "not string and content is not mapping and not content | rejectattr('type', 'equalto', 'text') | list %}"
           "{%- set content = content | map(attribute='text') | join %}{%- endif %}")


def _raise(reason: str) -> str:
    return f"{{{{- raise_exception({reason}) }}}}"


def _if(condition: str, then: str, otherwise: str = "") -> str:
    return f"{{%- if {condition} %}}{then}" + ("{%- else %}" + otherwise if otherwise else "") + "{%- endif %}"


def _choice(branches: dict[str, str], otherwise: str) -> str:
    chosen = "{%- el".join(f"if {condition} %}}{then}" for condition, then in branches.items())
    return "{%- " + chosen + "{%- else %}" + otherwise + "{%- endif %}"


def _environment(template: Template, text: Callable[[str], str]) -> str:
    """What the system turn says of tools."""
    environment = ""
    if template.tools_system:
        environment += _if("tools or builtin_tools", text(template.tools_system))
    if template.builtin_call:
        names = "{{- builtin_tools | reject('equalto', 'code_interpreter') | join(', ') }}"
        before, after = map(text, template.builtin_system)
        environment += _if("builtin_tools", before + names + after)
    return environment


def _call(template: Template, text: Callable[[str], str], stop: str) -> str:
    """The one call of a message, and its stop token."""
    def filled(format: str, arguments: str) -> str:
        fields = {"name": "{{- call['name'] }}", "arguments": arguments}
        parts = re.split(r"\{(name|arguments)\}", format)
        return "".join(fields[part] if i % 2 else text(part) for i, part in enumerate(parts))

    one = _if("message['tool_calls'] | length != 1", _raise("'one tool call a message'"))
    one += "{%- set call = message['tool_calls'][0]['function'] %}"
    given = _if("call['arguments'] is string", "{{- call['arguments'] }}", "{{- call['arguments'] | tojson }}")
    said = filled(template.call, given)
    if not template.builtin_call:
        return one + said + stop
    pairs = ("{%- for key, value in call['arguments'] | items %}{{- key + '=\"' + value + '\"' }}"
             "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}")
    builtin = _if("builtin_tools and call['name'] in builtin_tools", filled(template.builtin_call, pairs), said)
    return one + builtin + _if("builtin_tools", text(template.builtin_stop), stop)
