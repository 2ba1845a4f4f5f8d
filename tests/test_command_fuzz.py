"""Whatever is given to a command, and whatever became of a run's files, there is an answer or an error of a few lines.

Any option of any command gets values at the extremes of its type, and any byte of a run's folder is changed. No
traceback, no exit code but those that mean something, and nothing takes ten seconds of a processor. `python
tests/test_command_fuzz.py COUNT [SEED]` tries more than the suite does, and prints how many runs ended how.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import pytest
from small_runs import room_of_files

from minisft.__main__ import main, parser
from minisft.config_io import KEYS

SECONDS, WAITED = 10, 120  # of a processor; and by the clock, on a machine that has other work
MEMORY = 4 * 2**30  # bytes that a run may take
CODES = (0, 2, 3, 4)
INTEGERS = ("-1", "0", "1", "2", "7", str(2**31), str(2**62), str(2**63), "9" * 30, "9" * 400, "9" * 5000, "1e3", "-0",
            "0x1", "１", "", " ", "nan", "1_0")
FLOATS = ("0", "-0.0", "1e-300", "5e-324", "1e-5", "0.5", "1", "1.5", "1e5", "1e10", "1e18", "1e300", "inf", "-inf",
          "nan", "-1", "9" * 400, "", "x")
TEXTS = ("", " ", "x", "\x1b[31m\x1b]0;x\x07", "a" * 300, "a" * 5000, "\udcff", "ş\u202e", "..", ".", "/", "/dev/null",
         "$(x)'\"", "-", "--", "%s{}{0}", "a\nb", "no/such", "llama3", "text", "jinja", "model", "data.jsonl", "run",
         "recipe.toml", "run/metrics.jsonl", "sky_test.csv", "one.jsonl", "questions.jsonl", "new", "model/config.json",
         "pipe", "link", "a,b", "mt-en", "random", "llama-3-8b")
SHORT = ["--max-new-tokens", "2"]
USUAL = {
    "prepare": [], "show": [], "plan": ["--gpus", "1"],
    "chat": ["model", "--prompt", "hi", "--template", "llama3", *SHORT],
    "eval": ["model", "--template", "llama3", "--choices", "sky_test.csv", *SHORT],
    "answer": ["model", "--template", "llama3", "--questions", "questions.jsonl", "--out", "new", *SHORT],
    "compare": ["one.jsonl", "two.jsonl", "--questions", "questions.jsonl", "--out", "new"],
    "report": ["run"], "convert": ["model", "new"]}
OPTIONS = {command: [action for action in each._actions if not isinstance(action, argparse._HelpAction)]
           for command, each in parser()._subparsers._group_actions[0].choices.items()}


def value_of(action, draw):
    if action.choices:
        return draw.choice((*map(str, action.choices), *TEXTS[:6]))
    is_path = action.type in (None, Path)
    return draw.choice(TEXTS if is_path else FLOATS if action.type is float else (*INTEGERS, *FLOATS))


def arguments(draw):
    """A command that would work, with one to three of its options or keys given any value."""
    command = draw.choice(list(USUAL))
    given, more = list(USUAL[command]), []
    recipes = command in ("prepare", "show", "plan")
    for _ in range(draw.randint(1, 3)):
        if recipes and draw.random() < 0.8:
            key = draw.choice(list(KEYS))
            choices, is_number = KEYS[key].metadata["choices"], any(n in str(KEYS[key].type) for n in ("int", "float"))
            values = (*INTEGERS, *FLOATS) if is_number else (*TEXTS, *INTEGERS)
            more += [f"--{key}={draw.choice(choices if choices and draw.random() < 0.5 else values)}"]
            continue
        action = draw.choice(OPTIONS[command])
        value = value_of(action, draw)
        if not action.option_strings:
            given = [value, *given[1:]] if given and not given[0].startswith("-") else given
        else:
            option = action.option_strings[0]
            if option in given:
                del given[given.index(option) : given.index(option) + 2]
            more += [option] if action.nargs == 0 else [option, value]
    recipe = [draw.choice((*TEXTS, "demo"))] if draw.random() < 0.1 else ["recipe.toml"]
    return [command, *(recipe if recipes else []), *given, *more]


class Hang(BaseException):
    pass


def ends(argv):
    """How a command ends: its exit code, or what is wrong with it."""
    def hang(*_):
        raise Hang

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before = {number: signal.signal(number, hang) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITED)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(argv)
            except SystemExit as exit:
                code = exit.code
    except Hang:
        return "hang"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    shown = err.buffer.getvalue().decode()
    if argv[0] != "chat":  # an answer that goes into a file is what the model said
        shown += out.buffer.getvalue().decode()
    raw = sorted({char for char in shown if not char.isprintable() and char not in "\n\r\t"})
    return f"raw characters {raw} in {shown[:2000]!r}" if raw else code if code in CODES else f"exit code {code}"


def changed(content, draw):
    """`content` with a byte, or a few, other than they were."""
    at = draw.randrange(len(content) + 1)
    byte = bytes([draw.choice((draw.randrange(256), *b'"{}[],:0-9eEnNtI\\\n\x1b\xff'))])
    return draw.choice((content[:at] + byte + content[at + 1 :], content[:at] + byte + content[at:],
                        content[:at] + content[at + draw.choice((1, 1, 2, 40)) :], content[:at]))


RUN_FILES = ("config.toml", "metrics.jsonl", "status.json", "data.json", "environment.json")
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "training.json", "model.safetensors")


def damage(draw):
    """A file of the run, as it has become, and a command that reads it."""
    kind = draw.choice(("report", "report", "show", "eval"))
    name = "config.toml" if kind == "show" else draw.choice(RUN_FILES) if kind == "report" else \
        f"final/{draw.choice(MODEL_FILES)}"
    content = Path("whole", name).read_bytes()
    for _ in range(draw.choice((1, 1, 1, 3))):
        content = changed(content, draw)
    argv = {"report": ["report", "run", "--out", "new.html"], "show": ["show", "run/config.toml", "--index", "0"],
            "eval": ["eval", "run/final", "--choices", "sky_test.csv"]}[kind]
    return name, content, argv


def inside(room):
    """The room as each run finds it."""
    for name in ("new", "new.html", "new.key.json", "x"):
        shutil.rmtree(name, ignore_errors=True) if Path(name).is_dir() else Path(name).unlink(missing_ok=True)


def fuzz(count, seed, room):
    """-> how many runs ended in which way, and those that ended badly."""
    draw, found, bad, at_home = random.Random(seed), Counter(), [], os.getcwd()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, limits[1]))
    os.chdir(room)
    try:
        if not Path("whole").exists():
            shutil.copytree("run", "whole")
            os.mkfifo("pipe")
            os.symlink("data.jsonl", "link")
        for number in range(count):
            inside(room)
            if number % 3 < 2:
                argv, note = arguments(draw), ""
                end = ends(argv)
            else:
                name, content, argv = damage(draw)
                Path("run", name).write_bytes(content)
                end, note = ends(argv), f"{name}: {content!r}"
                Path("run", name).write_bytes(Path("whole", name).read_bytes())
            found[end if isinstance(end, int) else end if end == "hang" else "wrong"] += 1
            if not isinstance(end, int):
                bad.append(f"{argv}\n{note[:3000]}\n{end}")
    finally:
        os.chdir(at_home)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return found, bad


@pytest.fixture(scope="module")
def room(tmp_path_factory, base):
    return room_of_files(base, tmp_path_factory.mktemp("room"))


def test_whatever_is_given_ends_in_few_words(room):
    _, bad = fuzz(60, 0, room)
    assert not bad, "\n".join(bad[:3])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_whatever_is_given_ends_in_few_words_often(room, seed):
    _, bad = fuzz(1000, seed, room)
    assert not bad, "\n".join(bad[:3])


if __name__ == "__main__":
    from oracles.tiny_llama import write_tiny_llama

    with tempfile.TemporaryDirectory() as folder:
        made = room_of_files(write_tiny_llama(Path(folder) / "base"), Path(folder) / "room")
        ended, wrong = fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, made)
        print(*wrong, sep="\n\n")
        print(dict(ended))
