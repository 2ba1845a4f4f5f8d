"""A page hides whose answers are whose; ratings and a judge's verdicts become win rates with an interval."""

import json
import math
import random
import re
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
from browser import CONTRAST, browser, in_browser

from minisft.__main__ import main
from minisft.errors import UserError
from minisft.evals.answers import Answers
from minisft.evals.comparison import blind_page, describe, read_judgments, read_ratings, win_rates
from minisft.evals.questions import Prompt
from minisft.evals.rates import sign_test

NASTY = "</script><script>alert(1)</script><!-- {{POLICY}} {{DATA}} & \u2028 <b>bold</b> \"'"


def answers(name, count, text="answer {}"):
    return Answers(name, {i: (f"{name[-1]} " + text.format(i), "second") for i in range(count)}, {})


def key_file(page):
    return page.with_name(f"{page.name}.key.json")


def write_page(page, prompts, a, b, *, seed):
    html, key = blind_page(prompts, a, b, seed=seed)
    page.write_text(html, encoding="utf-8")
    key_file(page).write_text(json.dumps(key))
    return key


def questions(count):
    return [Prompt(i, (f"question {i}", "and then?")) for i in range(count)]


def data_of(page):
    """The pairs in a page, read as a browser does: the JSON block ends at the first </script."""
    html = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', html, re.DOTALL)[1])


def test_a_page_shows_every_pair_once_and_the_key_knows_the_sides(tmp_path):
    a, b = answers("secret-x", 21), answers("secret-y", 20)
    key = write_page(tmp_path / "p.html", questions(22), a, b, seed=3)
    pairs = data_of(tmp_path / "p.html")["pairs"]
    assert json.loads(key_file(tmp_path / "p.html").read_text(encoding="utf-8")) == key
    assert sorted(pair["question_id"] for pair in key["pairs"]) == list(range(20))
    for shown, hidden in zip(pairs, key["pairs"], strict=True):
        number, left = hidden["question_id"], "x" if hidden["left"] == "a" else "y"
        assert shown["turns"][0] == {"question": f"question {number}", "left": f"{left} answer {number}",
                                     "right": f"{'y' if left == 'x' else 'x'} answer {number}"}
        assert shown["turns"][1]["left"] == "second"
    lefts = [pair["left"] for pair in key["pairs"]]
    assert lefts.count("a") == 10
    assert len(set(pairwise(lefts))) == 4, "the sides take no turns"
    assert [pair["question_id"] for pair in key["pairs"]] != sorted(range(20))


def test_neither_names_nor_sides_are_in_the_page(tmp_path):
    page = tmp_path / "p.html"
    write_page(page, questions(6), answers("secret-x", 6), answers("secret-y", 6), seed=0)
    first = page.read_text(encoding="utf-8")
    assert "secret" not in first
    assert set(data_of(page)) == {"page", "pairs"}
    assert all(set(turn) == {"question", "left", "right"} for pair in data_of(page)["pairs"] for turn in pair["turns"])
    write_page(page, questions(6), answers("other-x", 6), answers("other-y", 6), seed=0)
    assert page.read_text(encoding="utf-8") == first, "the same answers of other models make the same page"


def test_answers_stay_text(tmp_path):
    page = tmp_path / "p.html"
    write_page(page, [Prompt(1, (NASTY,))], Answers("a", {1: (NASTY,)}, {}), Answers("b", {1: ("fine",)}, {}),
               seed=0)
    assert sorted(data_of(page)["pairs"][0]["turns"][0].values()) == sorted([NASTY, NASTY, "fine"])
    html = page.read_text(encoding="utf-8")
    assert html.count("<script") == html.count("</script>") == 2
    assert "innerHTML =" not in html
    assert not re.search(r"(src|href)=|https?:|@import|url\(", html), "a page needs no network"


def test_the_policy_allows_the_pages_script_alone(tmp_path):
    import base64
    import hashlib

    page = tmp_path / "p.html"
    write_page(page, questions(2), answers("a", 2), answers("b", 2), seed=0)
    html = page.read_text(encoding="utf-8")
    script = html[html.rindex("<script>") + 8 : html.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'content="{policy}"' in html


def test_an_answer_that_was_cut_off_says_so(tmp_path):
    a, b = answers("x", 4), answers("y", 4)
    a.cut.update({0: [True, False], 1: [False, True]})
    key = write_page(tmp_path / "p.html", questions(4), a, b, seed=0)
    pairs = data_of(tmp_path / "p.html")["pairs"]
    for shown, hidden in zip(pairs, key["pairs"], strict=True):
        side = "left" if hidden["left"] == "a" else "right"
        cut = {name: turn for turn, each in enumerate(shown["turns"]) for name in each if name.endswith("_cut")}
        assert cut == ({f"{side}_cut": hidden["question_id"]} if hidden["question_id"] < 2 else {})


@in_browser
def test_a_browser_shows_the_pair_as_text(tmp_path):
    page = tmp_path / "p.html"
    nasty, fine = Answers("a", {1: (NASTY,)}, {1: [True]}), Answers("b", {1: ("fine",)}, {})
    write_page(page, [Prompt(1, ("asked",))], nasty, fine, seed=0)
    with browser() as tab:
        tab.open(page, width=1400)
        shown = tab.ask("document.body.innerText")
        assert tab.requests == [page.as_uri()]
        for text in ("Question 1 of 1; 0 rated.", "asked", NASTY, "fine", "Left is better 1", "the keys 1, 2 and 3"):
            assert text in shown
        assert shown.count("cut off at the token limit") == 1
        assert tab.ask("document.querySelector('.answers .cut').previousSibling.textContent") == NASTY


@in_browser
def test_a_phone_rates_the_first_and_the_second(tmp_path):
    page = tmp_path / "p.html"
    key = write_page(page, questions(3), answers("x", 3, "long " * 100 + "{}"), answers("y", 3), seed=0)
    press = "document.querySelector('{}').click()"
    with browser() as tab:
        for dark in (False, True):
            tab.open(page, width=400, dark=dark, touch=True)
            assert tab.requests == [page.as_uri()]
            tab.requests.clear()
            assert tab.ask("document.documentElement.scrollWidth") <= 400
            shown = tab.ask("document.body.innerText")
            assert not re.search(r"\bleft\b|\bright\b|\bkeys\b|[123]$", shown, re.IGNORECASE)
            labels = [tab.ask(f"getComputedStyle(document.querySelectorAll('.answers > *')[{i}], '::before').content")
                      for i in (0, 1)]
            assert labels == ['"First"', '"Second"']
            assert tab.ask("""[...document.querySelectorAll('.answers > *')].slice(0, 2).map(
                (each) => each.getBoundingClientRect().left)""") == [16, 16]
            assert tab.ask("document.querySelector('footer').getBoundingClientRect().height") < 150
            contrast, text = tab.ask(CONTRAST)
            assert contrast >= 4.5, text
        tab.ask(press.format("[data-choice=right]"))
        assert tab.ask("document.getElementById('saved').innerText") == ""
        tab.ask(press.format("#save"))
        assert tab.ask("document.getElementById('saved').innerText") == (
            f"Saved 1 of 3 ratings as ratings-{key['page']}.json.")
        tab.ask(press.format("[data-choice=tie]"))
        assert tab.ask("document.getElementById('saved').innerText") == "", "the file lacks this one"


@in_browser
def test_a_turkish_browser_shows_a_turkish_page_and_saves_the_same_ratings(tmp_path):
    page = tmp_path / "p.html"
    a, b = answers("x", 2), answers("y", 2)
    a.turns[0], a.cut[0] = ("", "kesik"), [False, True]
    key = write_page(page, questions(2), a, b, seed=0)
    english = re.compile(r"answers? is|better|models|choose|buttons?|keys|browser|ratings?|save|equal|first|left|right|"
                         r"nothing|cut off|your|back|next", re.IGNORECASE)
    seen = "document.title + document.body.innerText + [...document.querySelectorAll('[aria-label]')].map(" \
           "(each) => each.ariaLabel + (each.placeholder || ''))"
    with browser() as tab:
        for width in (1400, 400):
            tab.open(page, width=width, touch=width < 500, language="tr-TR")
            shown = tab.ask(seen)
            assert not english.search(shown), "a word was not translated"
            assert "Soru 1 / 2; 0 seçim yapıldı. İki modelin yeri rastgele değişir." in shown
            assert tab.ask("document.documentElement.lang") == "tr"
            assert tab.ask("document.documentElement.scrollWidth") <= width
            assert tab.ask("document.querySelector('footer').getBoundingClientRect().height") < 150
        assert tab.ask("getComputedStyle(document.querySelector('.answers > *'), '::before').content") == '"Birinci"'
        pages = []
        for _ in "ab":
            pages.append(tab.ask("document.getElementById('pair').innerText"))
            tab.ask("document.querySelector('[data-choice=left]').click()")
        assert "(boş)" in "".join(pages)
        assert "".join(pages).count("belirteç sınırında kesildi") == 1
        assert "2 seçim yapıldı, hepsi tamam: seçimleri kaydedin." in tab.ask(seen)
        tab.ask("document.getElementById('save').click()")
        assert tab.ask("document.getElementById('saved').innerText") == (
            f"2 sorudan 2 seçim kaydedildi: ratings-{key['page']}.json")
        assert tab.ask("state.ratings") == {"0": "left", "1": "left"}
        tab.open(page, width=1400, language="tru")
        assert tab.ask("document.documentElement.lang") == "en", "a language whose name only begins alike"


def test_the_seed_decides_the_order(tmp_path):
    a, b = answers("x", 12), answers("y", 12)
    keys = [write_page(tmp_path / "p.html", questions(12), a, b, seed=seed) for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_same_answers_are_ties_and_not_shown(tmp_path):
    a, b = answers("x", 3), answers("y", 3)
    b.turns[1] = a.turns[1]
    key = write_page(tmp_path / "p.html", questions(3), a, b, seed=0)
    assert key["identical"] == [1]
    assert len(data_of(tmp_path / "p.html")["pairs"]) == 2
    with pytest.raises(UserError, match="all 3 answers of the two models are the same"):
        write_page(tmp_path / "p.html", questions(3), a, a, seed=0)
    with pytest.raises(UserError, match="have answered no question of --questions in common"):
        write_page(tmp_path / "p.html", questions(3), a, Answers("y", {9: ("z",)}, {}), seed=0)


def rate(folder, name, key, favourite):
    """A rater's file: `favourite` says for each question which model is better, "a", "b" or "tie"."""
    sides = {i: favourite[pair["question_id"]] for i, pair in enumerate(key["pairs"])}
    chosen = {str(i): best if best == "tie" else "left" if best == key["pairs"][i]["left"] else "right"
              for i, best in sides.items() if best}
    (folder / name).write_text(json.dumps({"page": key["page"], "rater": name, "ratings": chosen}))
    return folder / name


def test_ratings_become_a_win_rate(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    key = write_page(tmp_path / "p.html", questions(20), answers("x", 20), answers("y", 20), seed=5)
    file = rate(tmp_path, "r.json", key, ["a"] * 12 + ["tie"] * 4 + ["b"] * 3 + [""])
    (line,) = win_rates(read_ratings([file], [key_file(tmp_path / "p.html")]))
    assert (line["model_a"], line["model_b"], line["wins"], line["ties"], line["losses"]) == ("x", "y", 12, 4, 3)
    assert line["win_rate"]["rate"] == pytest.approx(14 / 19)
    wanted = stats.binomtest(14, 19).proportion_ci(method="wilson")
    assert line["win_rate"]["interval"] == pytest.approx([wanted.low, wanted.high], abs=1e-6)
    assert line["p"] == pytest.approx(stats.binomtest(12, 15).pvalue)
    assert "won 12, tied 4, lost 3; win rate, ties split: 73.7%" in describe([line])


def test_pages_of_one_pair_in_both_orders_are_one_comparison(tmp_path):
    files, keys = [], []
    for name, a, b, best in (("p", "x", "y", "a"), ("q", "y", "x", "b")):  # x wins on both
        key = write_page(tmp_path / f"{name}.html", questions(5), answers(a, 5), answers(b, 5), seed=1)
        files.append(rate(tmp_path, f"{name}.json", key, [best] * 5))
        keys.append(key_file(tmp_path / f"{name}.html"))
    (line,) = win_rates(read_ratings(files, keys))
    assert (line["model_a"], line["model_b"], line["wins"], line["losses"]) == ("x", "y", 5, 0)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (3, 9), (40, 20), (0, 7)])
def test_the_sign_test_is_scipys(wins, losses):
    stats = pytest.importorskip("scipy.stats")
    assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1)


def test_the_sign_test_of_many_pairs_is_exact_and_soon_there():
    """All of MMLU: 14,042 questions. Each term from its factorials takes a quarter of a minute."""
    wins, losses = 6900, 7142
    start, found = time.process_time(), sign_test(wins, losses)
    assert time.process_time() - start < 2
    logs = [math.lgamma(wins + losses + 1) - math.lgamma(k + 1) - math.lgamma(wins + losses - k + 1)
            for k in range(wins + 1)]
    assert found == pytest.approx(2 * math.fsum(math.exp(log - (wins + losses) * math.log(2)) for log in logs), 1e-8)


def test_a_pair_that_several_people_rated_counts_once(tmp_path):
    a, b = answers("x", 4), answers("y", 4)
    b.turns[3] = a.turns[3]
    key = write_page(tmp_path / "p.html", questions(4), a, b, seed=0)
    files = [rate(tmp_path, f"{i}.json", key, favourite)
             for i, favourite in enumerate((["a", "a", "b", ""], ["a", "b", "b", ""], ["a", "tie", "tie", ""]))]
    (line,) = win_rates(read_ratings(files, [key_file(tmp_path / "p.html")]))
    assert (line["wins"], line["ties"], line["losses"]) == (1, 2, 1)  # question 3 has the same answers: a tie
    assert line["win_rate"]["rate"] == pytest.approx((1 + 0.5 + 0.5 / 3 + 0.5) / 4)
    assert line["win_rate"]["count"] == 4


@pytest.mark.parametrize(("ratings", "message"), [
    ({"page": "other", "ratings": {}}, "rates page 'other', whose key is not among --key"),
    ({"page": "KEY"}, "not ratings that a page of `minisft compare` saved"),
    ({"page": "KEY", "ratings": {"7": "left"}}, "rating 7: 'left' does not fit this page"),
    ({"page": "KEY", "ratings": {"0": "a"}}, "rating 0: 'a' does not fit this page; a choice is left, right or tie"),
    ({"page": "KEY", "ratings": {"-1": "tie"}}, "rating -1"),
    ({"page": "KEY", "ratings": {"0": ["left"]}}, "rating 0: ['left'] does not fit this page"),
    ({"page": "KEY", "ratings": {"9" * 5000: "left"}}, "rating 9999999999999999999…: 'left' does not fit this page"),
    ({"page": ["KEY"], "ratings": {}}, "not ratings that a page of `minisft compare` saved"),
    ([], "must hold one JSON object"),
    ("[" * 10**5, "the JSON array is cut off"), ("{" * 10**5, "bad JSON: "), ("", "must hold one JSON object"),
])
def test_ratings_that_do_not_belong_are_refused(tmp_path, ratings, message):
    key = write_page(tmp_path / "p.html", questions(2), answers("x", 2), answers("y", 2), seed=0)
    text = ratings if isinstance(ratings, str) else json.dumps(ratings)
    (tmp_path / "r.json").write_text(text.replace("KEY", key["page"]))
    with pytest.raises(UserError, match=r"r.json:") as error:
        read_ratings([tmp_path / "r.json"], [key_file(tmp_path / "p.html")])
    assert message in str(error.value)


@pytest.mark.parametrize("wrong", [
    {"page": ["x"]}, {"model_a": 3}, {"pairs": 3}, {"pairs": [1, 2]}, {"pairs": [{"question_id": 1}]},
    {"pairs": [{"question_id": [1], "left": "a"}]}, {"identical": 3}, {"identical": [[1]]},
])
def test_a_file_that_is_no_key_is_refused(tmp_path, wrong):
    key = write_page(tmp_path / "p.html", questions(2), answers("x", 2), answers("y", 2), seed=0)
    file = rate(tmp_path, "r.json", key, "ab")
    (tmp_path / "k.json").write_text(json.dumps(key | wrong))
    with pytest.raises(UserError, match=r"k.json: not a page's key; give the .key.json that was written beside"):
        read_ratings([file], [tmp_path / "k.json"])


def judged(folder, *records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "j.jsonl").write_text(lines.replace("Infinity", "1e999"))  # which JSON allows, and Python reads as inf
    return folder / "j.jsonl"


def verdict(question, g1, g2, turn=1, models=("m", "n")):
    return {"question_id": question, "model_1": models[0], "model_2": models[1], "g1_winner": g1, "g2_winner": g2,
            "judge": ["judge", "pair-v2"], "turn": turn, "tstamp": 1.0}


def test_a_judges_pairs_are_counted_as_fastchat_does(tmp_path):
    file = judged(tmp_path, verdict(1, "model_1", "model_1"), verdict(2, "model_1", "model_2"),
                  verdict(3, "tie", "tie"), verdict(4, "error", "model_1"), verdict(5, "model_2", "model_2"),
                  verdict(6, "model_2", "model_2", models=("n", "m")), verdict(1, "tie", "model_1", turn=2))
    pairs, scores, left_out = read_judgments(file)
    lines = win_rates(pairs)
    assert (scores, left_out) == ({}, 1)
    assert [(line["turn"], line["wins"], line["ties"], line["losses"]) for line in lines] == [
        (None, 2, 3, 1), (1, 2, 2, 1), (2, 0, 1, 0)]
    assert lines[0]["model_a"] == "m", "the order of names, whatever that of the file"
    assert lines[0]["win_rate"]["rate"] == pytest.approx(3.5 / 6)
    assert "m against n, turn 2" in describe(lines, scores, left_out)
    assert "1 lines without a verdict were left out" in describe(lines, scores, left_out)


def test_a_judges_table_is_fastchats(tmp_path, capsys):
    """FastChat's own show_result over the same verdicts, in every order of the models."""
    pytest.importorskip("pandas")
    shown = pytest.importorskip("fastchat.llm_judge.show_result")
    r = random.Random(0)
    verdicts = [verdict(i, *r.choices(("model_1", "model_2", "tie", "error"), (5, 3, 2, 1), k=2), turn=turn,
                        models=r.choice((("m", "n"), ("n", "m")))) for i in range(40) for turn in (1, 2)]
    file = judged(tmp_path, *verdicts)
    shown.display_result_pairwise(SimpleNamespace(input_file=str(file), model_list=None, baseline_model=None))
    theirs = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("m "))
    pairs, _, left_out = read_judgments(file)
    line = win_rates(pairs)[0]
    assert [line["wins"], line["losses"], line["ties"]] == [int(count) for count in theirs[1:4]]
    assert line["win_rate"]["rate"] == pytest.approx(float(theirs[-1]), abs=1e-6)
    assert left_out == sum("error" in (each["g1_winner"], each["g2_winner"]) for each in verdicts) > 0


def test_a_judges_scores_give_the_same_table(tmp_path):
    def score(question, model, value):
        return {"question_id": question, "model": model, "score": value, "turn": 1, "judge": ["j", "single-v1"]}

    file = judged(tmp_path, score(1, "m", 3), score(1, "n", 3.1), score(2, "m", 3), score(2, "n", 9), score(3, "m", 9),
                  score(3, "n", -1), score(4, "n", 2))
    pairs, scores, left_out = read_judgments(file)
    (line,) = win_rates(pairs)
    assert (line["wins"], line["ties"], line["losses"], left_out) == (0, 1, 1, 1)
    assert scores == {"m": [3, 3, 9], "n": [3.1, 9, 2]}
    assert "m: mean score 5.00 of 3" in describe([line], scores)


@pytest.mark.parametrize(("record", "message"), [
    ({"question_id": 1, "turn": 1}, "needs g1_winner and g2_winner"),
    ({"turn": 1, "model": "m", "score": 3}, "needs question_id"),
    ({"question_id": 1, "model": "m", "score": True}, "a score that is a number"),
    ({"question_id": 1, "model": "m", "score": math.inf}, "a score that is a number"),
    ({**verdict(1, "A", "B")}, "a winner is model_1, model_2, tie or error, not 'A'"),
    ({**verdict(1, "tie", "tie", models=("m", "m"))}, "must be the names of two models"),
])
def test_a_broken_verdict_is_named_with_its_line(tmp_path, record, message):
    with pytest.raises(UserError, match=r"j.jsonl:2: ") as error:
        read_judgments(judged(tmp_path, verdict(1, "tie", "tie"), record))
    assert message in str(error.value)


def test_command_from_answers_to_win_rates(tmp_path, capsys):
    for name in ("x", "y"):
        lines = [{"question_id": i, "model_id": "final", "choices": [{"index": 0, "turns": [f"{name}{i}"]}]}
                 for i in (1001, 1002)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "p.html"
    assert main(["compare", str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl"), "--questions", "mt-en",
                 "--limit", "3", "--out", str(page)]) == 0
    assert "2 pairs to rate; 0 with the same answers, which are ties; 1 questions that" in capsys.readouterr().out
    key = json.loads(key_file(page).read_text(encoding="utf-8"))
    assert (key["model_a"], key["model_b"]) == ("final (A)", "final (B)")
    rated = rate(tmp_path, "r.json", key, {1001: "b", 1002: "b"})
    assert main(["compare", "--ratings", str(rated), "--key", str(key_file(page)), "--json",
                 str(tmp_path / "w.json")]) == 0
    assert "final (A) against final (B)\n  won 0, tied 0, lost 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "w.json").read_text(encoding="utf-8"))["pairs"][0]["losses"] == 2
    assert main(["compare", "--judge", str(judged(tmp_path, verdict(1, "tie", "tie")))]) == 0
    assert "m against n\n  won 0, tied 1, lost 0" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give two models, or --ratings, or --judge; `minisft compare --help` shows each"),
    (["a", "--questions", "mt-en", "--out", "p.html"], "a page needs two models, --questions FILE and --out PAGE.html"),
    (["a", "b", "--judge", "j"], "give two models, or --ratings, or --judge; `minisft compare --help` shows each"),
    (["a.jsonl", "b.jsonl", "--questions", "mt-en", "--out", "p.html"], "a.jsonl: no such file"),
    (["--ratings", "nowhere.json", "--key", "no.json"], "no.json: no such file"),
    (["--ratings", "nowhere.json", "--key", "."], ".: no such file"),
    (["a", "b", "--questions", "mt-en", "--out", "no/p.html"], "--out no/p.html: folder no does not exist; "
                                                               "create it first"),
    (["a", "b", "--questions", "mt-en", "--out", "b"], "--out b: this command reads that file and would "
                                                       "overwrite it; name another file"),
    (["--judge", "empty.jsonl", "--json", "empty.jsonl"], "--json empty.jsonl: this command reads that file "
                                                          "and would overwrite it; name another file"),
    (["--judge", "empty.jsonl"], "empty.jsonl: holds no verdicts"),
    (["a", "b", "--questions", "mt-en", "--out", "p.html", "--json", "p.json"], "--json: a page has no figures; they "
                                                                               "come with --ratings or --judge"),
])
def test_bad_arguments_end_in_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    assert main(["compare", *arguments]) == 2
    assert capsys.readouterr().err.strip() == f"error: {message}"
