"""Jinja, the template language of other programs: recognised and written, never executed.

A model's own Jinja is recognised if it stands for one of our templates. For the programs that serve a trained model
(transformers, vLLM) the template is written as Jinja, and gives the token ids that the model was trained on.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from minisft.data.conversation import Turn
from minisft.data.templates import Template
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.formats.parse import ROLES


def choose_template(name: str, known: dict[str, Template], tokenizer: Tokenizer, *,
                    option: str = "data.template") -> Template:
    """The template called `name`; without a name, the one that the tokenizer's folder says. Raises UserError if there
    is no such template. The user chooses with `option`; the same option with an s names a file of the user's own
    templates."""
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
    template = known[found[0]]
    return replace(template, default_system=found[1], begin=tokenizer.bos_token if begins else template.begin)


def recognize(jinja: object) -> tuple[str, str | None] | None:
    """The template's name and default system text that a model's own Jinja stands for; None if it is unknown. Unknown
    is any Jinja that does more than our templates: it reasons, puts a system text into a variable, does not trim as
    Llama-3 does, or puts a token of its own anywhere except at the beginning of ChatML. Every pattern takes time in
    proportion to the text."""
    if not isinstance(jinja, str) or "<think>" in jinja:
        return None
    if any("system" in name for name in re.findall(r"set\s++(\w++)\s*+=\s*+(?!''|\"\")['\"]", jinja)):
        return None
    header, line = r"<\|start_header_id\|>{}<\|end_header_id\|>(?:\\n|\n){{2}}", r"<\|im_start\|>{}(?:\\n|\n)"
    with suppress(UnicodeError):  # a \\x without its digits, half of a surrogate pair
        if re.search(header.format("assistant"), jinja) and re.search(r"\|\s*+trim", jinja):
            if "Cutting Knowledge Date" in jinja:
                return "llama3.1", ""
            return "llama3", _default_system(jinja, header.format("system"), "<|eot_id|>")
        if re.search(line.format("assistant"), jinja) and jinja.count("bos_token") == begins_with_bos(jinja):
            return "chatml", _default_system(jinja, line.format("system"), "<|im_end|>")
    return None


def begins_with_bos(jinja: str) -> bool:
    """True if the Jinja first writes the tokenizer's BOS token, with no white space after it."""
    return bool(re.match(r"\s*+\{\{-?\s*+bos_token\s*+(-\}\}|\}\}(?=\{))", jinja))


def _default_system(jinja: str, before: str, after: str) -> str | None:
    """The system text between a pattern and `after`, in a string of the Jinja or outside any {{ }}."""
    for string in re.finditer(rf"(['\"]){before}((?:\\.|(?!\1)[^\\])*+)", jinja, re.DOTALL):
        text, found, _ = string[2].partition(after)
        if found and text:
            text = text.encode("ascii", "backslashreplace").decode("unicode-escape")  # as Jinja reads a string
            text.encode()  # half of a surrogate pair is no text
            return text
    for chunk in re.split(r"[{}]", jinja):
        if start := re.search(rf"(?:^|\n){before}", chunk):
            text, found, _ = chunk[start.end() :].partition(after)
            if found and text:
                return text
    return None


CONTENT = ("{%- set content = message['content'] %}{%- if content is defined and content is sequence and content is "
           "not string and content is not mapping and not content | rejectattr('type', 'equalto', 'text') | list %}"
           "{%- set content = content | map(attribute='text') | join %}{%- endif %}")
CALL = "{%- set call = message['tool_calls'][0]['function'] %}"
PAIRS = ("{%- for key, value in call['arguments'] | items %}{{- key + '=\"' + value + '\"' }}"
         "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}")


def written(template: Template, fill: Callable[[str], str]) -> str:
    """The template as Jinja. `fill` replaces {bos} and {eos} with the tokenizer's tokens. It takes `messages`,
    `add_generation_prompt`, and what Llama-3.1's own takes for tools: `tools`, `builtin_tools`, messages with
    `tool_calls`, and results. Roles have the names that training accepts, except those of a turn that is a call as
    text, content may be a list of texts, and a blank system turn counts as none, as in training; it raises rather than
    leave anything out."""
    def text(marker: str) -> str:  # Jinja would read a bare \r as \n
        escaped = fill(marker).translate({ord("\\"): r"\\", ord("'"): r"\'", ord("\n"): r"\n", ord("\r"): r"\r"})
        return f"{{{{- '{escaped}' }}}}" if marker else ""

    def around(markers: tuple[str, ...], content: str) -> str:
        return text(markers[0]) + content + text(markers[1])

    def filled(marker: str, arguments: str) -> str:
        fields = {"name": "{{- call['name'] }}", "arguments": arguments}
        parts = re.split(r"\{(name|arguments)\}", marker)
        return "".join(fields[part] if i % 2 else text(part) for i, part in enumerate(parts))

    roles = {role: str([name for name, own in ROLES.items() if own == role]) for role in ROLES.values()}
    content = _if("content is not string", _raise("'content is not text'"))
    content += "{{- content | trim }}" if template.trim else "{{- content }}"
    answer, stop, after = map(text, template.assistant)
    environment = _if("tools or builtin_tools", text(template.tools_system)) if template.tools_system else ""
    if template.builtin_call:
        names = "{{- builtin_tools | reject('equalto', 'code_interpreter') | join(', ') }}"
        environment += _if("builtin_tools", around(template.builtin_system, names))
    environment += text(template.system_prefix)
    branches = {f"message['role'] in {roles['system']}": around(template.system, environment + content)}
    refusal, definitions = _raise("'this template does not know these tools'"), ""
    unknown = "" if template.builtin_call else _if("builtin_tools", refusal)
    if template.call:
        arguments = _if("call['arguments'] is string", "{{- call['arguments'] }}", "{{- call['arguments'] | tojson }}")
        said, end = filled(template.call, arguments), stop
        if template.builtin_call:
            said = _if("builtin_tools and call['name'] in builtin_tools", filled(template.builtin_call, PAIRS), said)
            end = _if("builtin_tools", text(template.builtin_stop), stop)
        one = _if("message['tool_calls'] | length != 1", _raise("'one tool call a message'"))
        branches["message['tool_calls']"] = answer + one + CALL + said + end + after
        branches[f"message['role'] in {roles['result']}"] = around(template.result, "{{- content | tojson }}")
        before, behind = map(text, template.tools_user)
        definitions = _if(f"tools and (loop.first or loop.index0 == 1 and messages[0]['role'] in {roles['system']})",
                          before + "{%- for tool in tools %}{{- tool | tojson(indent=4) }}" + behind + "{%- endfor %}")
    else:
        unknown = _if("tools or builtin_tools or message['tool_calls']", refusal)
    branches[f"message['role'] in {roles['user']}"] = around(template.user, definitions + content)
    branches[f"message['role'] in {roles['assistant']}"] = answer + content + stop + after
    choice = "{%- el".join(f"if {condition} %}}{then}" for condition, then in branches.items())
    choice += "{%- else %}" + _raise("'this template does not know the role ' ~ message['role']") + "{%- endif %}"
    no_system = f"message['role'] in {roles['system']} and (not content or content is string and not content | trim)"
    begin = ("{%- set message = messages[0] %}" + CONTENT + _if(no_system, "{%- set messages = messages[1:] %}")
             + text(template.begin))
    if template.default_system is not None:
        default = template.content(Turn("system", template.default_system)).removeprefix(template.system_prefix)
        begin += _if(f"messages[0]['role'] not in {roles['system']}",
                     around(template.system, environment + text(default)))
    jinja = (begin + "{%- for message in messages %}" + CONTENT + unknown + "{%- " + choice + "{%- endfor %}"
             + _if("add_generation_prompt", answer))
    return jinja.replace("' }}{{- '", "")  # two strings in a row are one; a quote inside of a string is \\'


def _raise(reason: str) -> str:
    return f"{{{{- raise_exception({reason}) }}}}"


def _if(condition: str, then: str, otherwise: str = "") -> str:
    return f"{{%- if {condition} %}}{then}" + ("{%- else %}" + otherwise if otherwise else "") + "{%- endif %}"
