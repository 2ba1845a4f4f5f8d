"""The documents stay true: links lead to what they name, and commands print what stands below them.

    python tests/test_docs.py --fix                       follow every symbol to the file that defines it now
    python tests/test_docs.py --record FOLDER [LINE ...]  run the commands of docs/lesson.md (those in LINEs) in FOLDER,
                                                          and write what they print into both lessons

A link into code names a symbol, and no lines, which any edit would move: `[loss.py: batch_loss](../minisft/loss.py)`
needs a loss.py that defines `batch_loss`.

A block ```sh is a command. Commands run in the order of the documents, in one folder, as a reader runs them; one that
stands in two documents runs once. The ```output after a command is compared with what it prints:

    ```sh          needs only the demo's data, and takes a moment
    ```sh slow     needs the demo's base model, or trains
    ```output      must be equal
    ```output 20%  numbers may be that much off, percentages also by 2 points, and quoted text may differ, because what
                   a model says depends on the processor too
    ...            (a line) any lines
"""

import ast
import difflib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"), key=lambda file: file.name == "ders.md")]
ENGLISH, TURKISH = ROOT / "docs/lesson.md", ROOT / "docs/ders.md"
LINK = re.compile(r"\[(?P<text>[^\]\n]+)\]\((?P<path>[^)#\s]*)(?:#(?P<place>[^)\s]*))?\)")
NAMED = re.compile(r"(?P<tick>`?)(?P<file>[\w-]+\.(?:py|toml)): (?P<name>[\w.]+)`?")
FIX = "python tests/test_docs.py --fix"
FENCE = re.compile(r"^```(?P<kind>\w*) ?(?P<note>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
# A quoted text as Python writes it; an apostrophe within a word ends none. It has '"' around it if there is one.
QUOTED = re.compile(r"""'[^'\n]*(?:'\w[^'\n]*)*'|"[^"\n]*\"""")
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?")


# ---- links -----------------------------------------------------------------------------------------------------------


def defines(file: Path, name: str) -> bool:
    """Tell if a Python file defines a class, function, constant, method or field, or a TOML file a table."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".toml":
        return re.search(rf'^\[+"?{re.escape(name)}"?\]', text, re.MULTILINE) is not None
    node: ast.AST | None = ast.parse(text)
    for part in name.split("."):
        node = next((child for child in ast.iter_child_nodes(node) if part in names(child)), None)
        if node is None:
            return False
    return True


def names(node: ast.AST) -> list[str]:
    """The names that a statement defines."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))]


def home(file: str, name: str, code: Path) -> Path | None:
    """Find the file below `code` that defines `name`: the only one, or the only one called `file`."""
    found = [path for suffix in ("py", "toml") for path in code.rglob(f"*.{suffix}") if defines(path, name)]
    for homes in (found, [path for path in found if path.name == file]):
        if len(homes) == 1:
            return homes[0]
    return None


def wrong_links(document: Path, code: Path = ROOT / "minisft") -> tuple[list[str], str]:
    """Return what is wrong with the links of a document, and its text with everything repaired that can be."""
    wrong: list[str] = []

    def checked(link: re.Match) -> str:
        path, place = link["path"], link["place"]
        if path.startswith(("http:", "https:")):
            return link[0]
        target = document.parent / path if path else document
        where, repaired = f"{document.name}: {link[0]}", link[0]
        if place is not None and target.suffix != ".md":
            wrong.append(f"{where}: lines move; name a symbol, as in `loss.py: batch_loss` ({FIX})")
            repaired = f"[{link['text']}]({path})"
        if named := NAMED.fullmatch(link["text"]):
            if target.is_file() and target.name == named["file"] and defines(target, named["name"]):
                return repaired
            if not (moved := home(named["file"], named["name"], code)):
                wrong.append(f"{where}: {path} does not define {named['name']}, and no other file alone does")
                return repaired
            moved = Path(os.path.relpath(moved, document.parent))
            wrong.append(f"{where}: {named['name']} is in {moved.as_posix()} ({FIX})")
            return f"[{named['tick']}{moved.name}: {named['name']}{named['tick']}]({moved.as_posix()})"
        if not target.exists():
            wrong.append(f"{where}: no such file")
        elif place is not None and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            if place not in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}:
                wrong.append(f"{where}: no such heading")
        return repaired

    return wrong, LINK.sub(checked, document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_lead_to_what_they_name(file):
    assert not wrong_links(file)[0]


def test_the_two_languages_lead_to_the_same_places_and_run_the_same_commands():
    """They are written independently, but neither may leave out what the other has."""
    places = [{(link["path"], link["text"]) for link in LINK.finditer(file.read_text(encoding="utf-8"))
               if link["path"].startswith("../minisft")} for file in (ENGLISH, TURKISH)]
    assert places[0] == places[1]
    assert [block.command for block in blocks(ENGLISH)] == [block.command for block in blocks(TURKISH)]


def written_as_is(text: str) -> tuple[list[str], set[str], Counter[str]]:
    """What a translation does not touch: lines of code without comments, `code` in a sentence, and how often each
    number is named, whether it is written 1,234.5 or 1.234,5."""
    code = [line.partition("  #")[0].rstrip() for fence in FENCE.finditer(text) for line in fence["body"].splitlines()]
    inline = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))}
    return code, inline, Counter(re.sub("[.,]", "", number) for number in re.findall(r"\d[\d.,]*\d|\d", text))


@pytest.mark.parametrize(("english", "turkish", "only_english"), [
    ("evaluation.md", "degerlendirme.md", "$^"), ("from-trl.md", "trlden-buraya.md", "$^"),
    ("silent-bugs.md", "sessiz-hatalar.md", r"^\|.*\n")])
def test_a_page_in_turkish_has_the_commands_and_the_figures_of_the_english_one(english, turkish, only_english):
    ours, theirs = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in (english, turkish))
    assert written_as_is(re.sub(only_english, "", ours, flags=re.MULTILINE)) == written_as_is(theirs)
    for text, other in ((ours, turkish), (theirs, english)):
        assert f"]({other})" in text.partition("\n## ")[0], "the head names the other"


# ---- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A command of a document, and what it should print."""

    file: Path
    line: int
    command: str
    slow: bool
    expected: str | None = None
    tolerance: float = 0.0
    span: tuple[int, int] = (0, 0)  # of `expected` in the file

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}"


def blocks(file: Path) -> list[Block]:
    """Return the commands of a document in order, each with the output that follows it."""
    text, found = file.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        if fence["kind"] == "sh":
            line = text.count("\n", 0, fence.start()) + 1
            found.append(Block(file, line, fence["body"], fence["note"] == "slow"))
        elif fence["kind"] == "output":
            *before, last = found
            assert last.expected is None, f"{last}: two outputs of one command"
            tolerance = float(fence["note"].rstrip("%") or 0) / 100
            found = [*before, Block(file, last.line, last.command, last.slow, fence["body"], tolerance,
                                    fence.span("body"))]
    return found


def run(command: str, folder: Path) -> str:
    """Run a command on a CPU, in a folder that looks like the repository; returns its standard output."""
    for name in ("train.py", "minisft", "docs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir(exist_ok=True)
    for name, program in (("minisft", "-m minisft"), ("torchrun", "-m torch.distributed.run"), ("python", "")):
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {program} "$@"\n')
        file.chmod(0o755)
    settings = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
                "XDG_CACHE_HOME": str(folder / "cache"), "NO_COLOR": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command = command.replace("pip install -e . && ", "")  # .ci/run does so, in an environment of its own
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=folder, env={**os.environ, **settings},
                          capture_output=True, text=True)
    assert done.returncode == 0, f"$ {command}{done.stdout}{done.stderr}"
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()) + "\n"


def differences(expected: str, printed: str, tolerance: float) -> str:
    """Return how `printed` differs from `expected` by the rules above; empty if it does not."""
    pattern = []
    for line in expected.splitlines(keepends=True):
        if line == "...\n":
            pattern.append(r"(?:[^\n]*\n)*?")
            continue
        if not tolerance:
            pattern.append(re.escape(line))
            continue
        for part in re.split(f"({QUOTED.pattern})", line):
            literal = NUMBER.split(part)
            pattern.append("""(?:'.*'|".*")""" if QUOTED.fullmatch(part) else r"\s*(\S+?)\s*".join(
                r"\s+".join(map(re.escape, re.split(r"\s+", text))) for text in literal))
    found = re.fullmatch("".join(pattern), printed)
    numbers = [n for part in QUOTED.split(expected) for n in NUMBER.findall(part)]
    if found and (not tolerance or all(near(a, b, tolerance) for a, b in zip(numbers, found.groups(), strict=True))):
        return ""
    return "".join(difflib.unified_diff(expected.splitlines(True), printed.splitlines(True), "document", "printed"))


def near(expected: str, printed: str, tolerance: float) -> bool:
    """Tell if two written numbers differ by `tolerance` of the larger, one in the last place, or 2 points at most."""
    if not NUMBER.fullmatch(printed) or expected.endswith("%") != printed.endswith("%"):
        return False
    a, b = (float(text.rstrip("%").replace(",", "")) for text in (expected, printed))
    least = 2.0 if expected.endswith("%") else 10.0 ** -len(expected.partition(".")[2])
    return abs(a - b) <= max(tolerance * max(abs(a), abs(b)), 1.001 * least)


def check(block: Block, folder: Path) -> None:
    printed = run(block.command, folder)
    if block.expected is not None:
        found = differences(block.expected, printed, block.tolerance)
        assert not found, f"{block}\n$ {block.command}{found}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The demo's data and, instead of the base model, a folder with its tokenizer and shape."""
    from minisft.demo.demo_run import COUNTRIES, write_world

    folder = tmp_path_factory.mktemp("docs")
    write_world(folder / "runs/demo-world", countries=COUNTRIES, seed=0)
    (folder / "runs/demo-base/final").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "runs/demo-world" / name, folder / "runs/demo-base/final")
    return folder


def once(all_blocks: list[Block]) -> list[Block]:
    """Drop the blocks whose command and output an earlier block has too."""
    return list({(block.command, block.expected): block for block in reversed(all_blocks)}.values())[::-1]


ALL = [block for file in DOCS for block in blocks(file)]


@pytest.mark.parametrize("block", [block for block in once(ALL) if not block.slow], ids=str)
def test_a_quick_command_prints_what_the_document_says(block, world):
    check(block, world)


@pytest.mark.slow
def test_all_commands_print_what_the_documents_say(tmp_path):
    """A quarter of an hour: the demo, and what else the lesson trains."""
    for block in once(ALL):
        check(block, tmp_path)


# ---- the test of the test --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expected", "printed", "tolerance", "same"), [
    ("a 1\n", "a 1\n", 0.0, True),
    ("a 1\n", "a 2\n", 0.0, False),
    ("a\n...\nz\n", "a\nb\nc\nz\n", 0.0, True),
    ("a\n...\nz\n", "b\nz\n", 0.0, False),
    ("base 0.0%, tuned 96.5%\n", "base 0.0%, tuned 98.0%\n", 0.1, True),
    ("base 0.0%, tuned 96.5%\n", "base 0.0%, tuned 70.0%\n", 0.1, False),
    ("base 0.0%, tuned 96.5%\n", "base 9.0%, tuned 96.5%\n", 0.1, False),
    ("base 0.5%, tuned 96.5%\n", "base 0.0%, tuned 96.5\n", 0.1, False),
    ("base 0.5%, tuned 96.5%\n", "base 0.0%, tuned 96.5%\n", 0.1, True),
    ("base 'The euro.'\n", "base 'It's the lira.'\n", 0.1, True),
    ("base 'The euro.'\n", "tuned 'The euro.'\n", 0.1, False),
    ("base 'Avro.' 1\n", 'base "Malta\'da avro." 1\n', 0.1, True),
    ('base "Malta\'da 2 avro." 1\n', "base 'Avro.' 1\n", 0.1, True),
    ('base "Malta\'da avro." 9\n', "base 'Avro.' 1\n", 0.1, False),
    ("  9.5 x\n", " 10.1 x\n", 0.1, True),
    ("loss 1.05\n", "loss nan\n", 0.5, False),
    ("step 1,200\n", "step 1,100\n", 0.1, True),
])
def test_outputs_are_compared_as_told(expected, printed, tolerance, same):
    assert (differences(expected, printed, tolerance) == "") == same


def test_a_link_to_a_symbol_that_moved_is_found_and_repaired(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.py").write_text("class A:\n    x: int = 1\n\n    def f(self):\n        return 1\n")
    (tmp_path / "b" / "c.py").write_text("K = 3\n\n\ndef twice(): ...\n")
    (tmp_path / "d.py").write_text("def twice(): ...\n")
    (tmp_path / "t.toml").write_text('[a]\nx = 1\n\n["b.c"] # here\ny = 1\nz = 2\n')
    doc = tmp_path / "doc.md"
    doc.write_text("# A head: line\n[`a.py: A.f`](a.py) [t.toml: b.c](t.toml) [`a.py: A.x`](a.py#L1-L2) "
                   "[K.py: K](a.py) [c.py: twice](c.py) [e.py: twice](d.py) [a.py: B](a.py) "
                   "[y](#a-head-line) [z](b.py) [w](#b)")
    wrong, right = wrong_links(doc, tmp_path)
    assert [text.partition("): ")[2] for text in wrong] == [
        "lines move; name a symbol, as in `loss.py: batch_loss` (python tests/test_docs.py --fix)",
        "K is in b/c.py (python tests/test_docs.py --fix)", "twice is in b/c.py (python tests/test_docs.py --fix)",
        "d.py does not define twice, and no other file alone does",
        "a.py does not define B, and no other file alone does", "no such file", "no such heading"]
    assert right == (doc.read_text().replace("a.py#L1-L2", "a.py").replace("[K.py: K](a.py)", "[c.py: K](b/c.py)")
                     .replace("(c.py)", "(b/c.py)"))


def test_the_readmes_recipe_and_command_line_are_ones_that_can_be_loaded(tmp_path, monkeypatch):
    from minisft import config_io

    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [recipe] = [fence["body"] for fence in FENCE.finditer(text) if fence["kind"] == "toml"]
    (tmp_path / "my.toml").write_text(recipe)
    options = re.search(r"minisft train my.toml (.*)", text)[1].split()
    assert config_io.load(["my.toml", *options]).optim.lr == 1e-5
    assert tomllib.loads(recipe)["data"]["template"] == "llama3"


def fix() -> None:
    """Repair the links of all documents, and print what is still wrong."""
    for file in DOCS:
        _, right = wrong_links(file)
        if right != file.read_text(encoding="utf-8"):
            file.write_text(right, encoding="utf-8")
        for problem in wrong_links(file)[0]:
            print(problem)


def record(folder: Path, lines: list[int]) -> None:
    """Run the lesson's commands (those at `lines`, or all), and write what they print into both lessons."""
    folder.mkdir(parents=True, exist_ok=True)
    for block in [block for block in blocks(ENGLISH) if not lines or block.line in lines]:
        print(f"$ {block.command}", end="", flush=True)
        printed = run(block.command, folder.resolve())
        print(printed, flush=True)
        for file in (ENGLISH, TURKISH):
            for same in blocks(file):
                if same.command == block.command and same.expected is not None:
                    text = file.read_text(encoding="utf-8")
                    file.write_text(text[: same.span[0]] + printed + text[same.span[1] :], encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(Path(sys.argv[2]), [int(line) for line in sys.argv[3:]])
    else:
        fix()
