"""The lesson's pictures are what docs/draw.py draws now, can be read by everyone, and stand in both lessons."""

import re
from xml.etree import ElementTree

import pytest

from docs.draw import DOCS, PICTURES, draw
from tests.browser import CONTRAST, browser, in_browser

SVG = "{http://www.w3.org/2000/svg}"
COMMITTED = sorted((DOCS / "images").glob("*.svg"))
# Texts that leave the picture, and pairs that lie on each other; a pixel of either does no harm.
CLASHES = """(() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const whole = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
    const at = texts.map((text) => text.getBoundingClientRect());
    at.forEach((a, i) => {
      if (a.left < whole.left - 1 || a.right > whole.right + 1 || a.top < whole.top - 1 || a.bottom > whole.bottom + 1)
        found.push(texts[i].textContent);
      at.slice(0, i).forEach((b, j) => {
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
          found.push(texts[j].textContent + " / " + texts[i].textContent);
      });
    });
  }
  return found;
})()"""


def test_drawing_again_gives_the_committed_files(tmp_path):
    draw(tmp_path)
    drawn = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    assert len(drawn) == 2 * len(PICTURES)
    committed = {file.name: file.read_text(encoding="utf-8") for file in COMMITTED if not file.name.startswith("demo-")}
    assert sorted(drawn) == sorted(committed)
    old = [name for name, svg in drawn.items() if svg != committed[name]]
    assert not old, f"{old}: run python docs/draw.py, and look at them"


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_a_picture_says_what_it_shows(file):
    svg = ElementTree.parse(file).getroot()
    assert svg.tag == f"{SVG}svg"
    assert svg.get("viewBox")
    assert [child.tag for child in svg][:2] == [f"{SVG}title", f"{SVG}desc"]
    assert svg[0].text.strip()
    assert svg[1].text.strip()


def test_the_pictures_say_what_is_so():
    """By hand: documents of 3, 2 and 4 tokens have triangles of 6, 3 and 10, all nine together one of 45."""
    packing, pieces, shift = ((DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8")
                              for name in ("packing", "pieces", "shift"))
    legend = 1
    assert packing.count('class="own soft"') == 19 + 19 + legend
    assert packing.count('class="leak"') == 45 - 19 + legend
    trained = re.findall(r'class="trained soft[^"]*"/>\n<text[^>]*>([^<]*)<', pieces)
    assert trained == ["Paris.", "&lt;|eot_id|&gt;", "It ends a turn.", "&lt;|eot_id|&gt;", "trained"]
    answer = re.findall(r'class="trained soft"/>.*?<text.*?<text[^>]*>[^<]*<.*?<text[^>]*>([^<]*)<', shift, re.DOTALL)
    assert answer == ["People", "␣in", "␣Italy", "␣speak", "␣Italian", ".", "&lt;|eot_id|&gt;"]
    assert shift.count(">-100<") == shift.count(">no<") == 19 - len(answer)


def test_both_lessons_show_each_picture_in_the_same_section():
    shown = []
    for lesson, suffix in (("lesson.md", ""), ("ders.md", ".tr")):
        sections = re.split(r"^## ", (DOCS / lesson).read_text(encoding="utf-8"), flags=re.MULTILINE)
        found = [(place, *image) for place, section in enumerate(sections)
                 for image in re.findall(r"!\[([^\]]+)\]\(images/([\w-]+)((?:\.tr)?)\.svg\)", section)]
        assert {end for *_, end in found} == {suffix}, lesson
        assert min(len(alt) for _, alt, *_ in found) > 20, lesson
        shown.append([(place, name) for place, _, name, _ in found])
    assert shown[0] == shown[1]
    assert sorted(name for _, name in shown[0]) == sorted(picture.__name__.replace("_", "-") for picture in PICTURES)


@in_browser
def test_no_words_are_cut_off_hidden_or_pale(tmp_path):
    page = tmp_path / "page.html"
    with browser() as tab:
        for file in COMMITTED:
            if not file.name.startswith("demo-"):  # matplotlib laid those out
                page.write_text('<!doctype html><meta charset="utf-8">'
                                '<meta name="viewport" content="width=device-width">'
                                "<style>body { margin: 16px; background: #fff } svg { width: 100%; height: auto }"
                                "@media (prefers-color-scheme: dark) { body { background: #15181c } }</style>"
                                f"<body>{file.read_text(encoding='utf-8')}")
                for width, dark in ((360, False), (360, True), (600, False)):
                    tab.open(page, width=width, dark=dark, touch=width < 500)
                    assert tab.ask(CLASHES) == [], (file.name, width)
                    assert tab.ask(CONTRAST)[0] >= 4.5, (file.name, dark, tab.ask(CONTRAST))
