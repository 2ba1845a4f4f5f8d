"""Draw the pictures of lesson.md and ders.md: `python docs/draw.py` writes docs/images/NAME.svg and NAME.tr.svg.

What a picture shows is computed: pieces by the renderer, targets by `micro_batch`, who sees whom by `attend`, rates by
`learning_rate`. What only a trained model can say is taken from the output blocks of lesson.md, so nothing is typed
twice. tests/test_draw.py draws again and compares. After a change of the text, look at them: in light and dark, and as
wide as a phone.
"""

import ast
import json
import math
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable
from functools import cache
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from minisft.config import OptimConfig
from minisft.config_io import load
from minisft.data.batches import micro_batch
from minisft.demo.demo_run import COUNTRIES, write_world
from minisft.evals.rates import wilson
from minisft.formats.parse import read
from minisft.model.llama import Documents, attend
from minisft.prepare import Prepared, prepare
from minisft.reports.page import style
from minisft.training.optimizer import learning_rate

DOCS = Path(__file__).parent
EXPERIMENTS = DOCS / "experiments"
WIDTH, MONO = 400, 7.3  # of a picture, so that its letters are legible on a phone; of a letter of a token
STYLE = """text { font-size: 13px; fill: var(--ink) } text.faint, text.mono.faint { fill: var(--faint) }
svg text.mono { font: 12px ui-monospace, monospace !important } text.bold { font-weight: 600 }
.line { fill: none; stroke: var(--line) } .axis { fill: none; stroke: var(--faint) } .dashed { stroke-dasharray: 3 3 }
.own { fill: var(--c0); stroke: var(--c0) } .leak { fill: var(--c1); stroke: var(--c1) }
.trained { fill: var(--c2); stroke: var(--c2) } .soft { fill-opacity: .18 }
.curve { fill: none; stroke-width: 2 } .thin { stroke-width: 1.2 } .tip { fill: var(--faint) }
"""
Say = Callable[[str, str], str]  # chooses the English or the Turkish text
Data = Callable[[str], Prepared]  # reads a file of conversations


# ---- what is drawn with ----------------------------------------------------------------------------------------------


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words, quote=False)}</text>\n'


def box(x: float, y: float, width: float, height: float, kind: str = "line") -> str:
    return f'<rect x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}" rx="3" class="{kind}"/>\n'


def line(points: list[tuple[float, float]], kind: str = "line") -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>\n'


def arrow(points: list[tuple[float, float]]) -> str:
    """Along `points`, with its tip at the last of them; the last stretch is straight down or to the left."""
    (x0, _), (x, y) = points[-2:]
    tip = f"{x - 4},{y - 7} {x + 4},{y - 7}" if x == x0 else f"{x + 7},{y - 4} {x + 7},{y + 4}"
    return line(points, "axis") + f'<polygon points="{tip} {x:g},{y:g}" class="tip"/>\n'


def number(say: Say, value: float, form: str) -> str:
    """1.5 in English, 1,5 in Turkish; 97.5% and %97,5."""
    shown = format(value, form)
    turkish = shown.translate(str.maketrans(".,", ",."))
    return say(shown, f"%{turkish[:-1]}" if shown.endswith("%") else turkish)


def chart(x: float, y: float, width: float, height: float, xs: list[float], ys: list[float], *, x_form: str,
          y_form: str, say: Say) -> tuple[str, Callable[[float, float], tuple[float, float]]]:
    """A grid with ticks at `xs` and `ys`, from the first to the last of them, and where in it a point lies."""
    def at(a: float, b: float) -> tuple[float, float]:
        return x + (a - xs[0]) / (xs[-1] - xs[0]) * width, y + height - (b - ys[0]) / (ys[-1] - ys[0]) * height

    grid = "".join(line([at(xs[0], b), at(xs[-1], b)]) + text(x - 6, at(0, b)[1] + 4, number(say, b, y_form), "faint",
                                                              "end") for b in ys)
    return grid + "".join(text(at(a, 0)[0], y + height + 17, number(say, a, x_form), "faint", "middle")
                          for a in xs), at


def printed_by(command: str) -> str:
    """What stands in lesson.md below the command that contains `command`."""
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", (DOCS / "lesson.md").read_text(encoding="utf-8"), re.M | re.S)
    found = [body for (_, before), (kind, body) in pairwise(fences) if command in before and kind == "output"]
    assert found, f"docs/lesson.md: no ```output below a command with {command!r}"
    return found[0]


def tokens(data: Prepared, ids: np.ndarray) -> list[str]:
    """The text of each token, with line ends and leading spaces made visible."""
    return [re.sub("^ ", "␣", data.tokenizer.decode([int(token)]).replace("\n", "↵")) for token in ids]


# ---- the pictures: title, description, height, and what is in them ---------------------------------------------------

Picture = tuple[str, str, float, str]


def base_and_instruct(say: Say, _: Data) -> Picture:
    question, base, tuned = printed_by("python train.py | tail -12").splitlines()[6:9]
    said = [ast.literal_eval(re.search('''["'].*["']''', answer)[0]) for answer in (base, tuned)]
    svg, y = box(60, 4, 280, 30) + text(200, 24, question.strip(), "", "middle"), 46
    for kind, name, does, answer in (
            ("leak", say("base model", "temel model"), say("goes on with a page", "sayfayı sürdürür"), said[0]),
            ("trained", say("tuned model", "ince ayarlı model"), say("takes its turn, and stops",
                                                                     "sırası gelince konuşur ve durur"), said[1])):
        lines = textwrap.wrap(answer, 48)
        svg += box(2, y, 396, 34 + 20 * len(lines), f"{kind} soft") + text(14, y + 20, name, "bold")
        svg += text(386, y + 20, does, "faint", "end")
        svg += "".join(text(14, y + 42 + 20 * i, words) for i, words in enumerate(lines))
        y += 46 + 20 * len(lines)
    return (say("One question to the base model and to the tuned one",
                "Temel modele ve ince ayarlı modele aynı soru"),
            say(f"{question.strip()} The base model goes on as in an article: {said[0]} The tuned model answers: "
                f"{said[1]}",
                f"{question.strip()} Temel model bir yazıyı sürdürür gibi: {said[0]} İnce ayarlı model yanıtlar: "
                f"{said[1]}"), y - 8, svg)


def formats(say: Say, data: Data) -> Picture:
    def fields(value: object) -> str:
        """The names in a record: those within follow a colon."""
        record = value[0] if isinstance(value, list) and value else value
        return "" if not isinstance(record, dict) else ", ".join(
            key + (f": {inner}" if (inner := fields(of)) else "") for key, of in record.items() if of != [])

    files, svg, y, middles = sorted((EXPERIMENTS / "formats").glob("*.jsonl")), "", 2, []
    for file in files:
        lines = textwrap.wrap(fields(json.loads(file.read_text(encoding="utf-8"))), 30)
        height = 28 + 16 * len(lines)
        svg += box(2, y, 236, height) + text(10, y + 18, file.stem, "mono bold")
        svg += "".join(text(10, y + 36 + 16 * i, words, "mono faint") for i, words in enumerate(lines))
        middles.append(y + height / 2)
        y += height + 8
    [conversation] = {tuple((turn.role, turn.content) for turn in next(read(file)).turns) for file in files}
    train = [data(str(file)).train.document(0) for file in files]
    [(count, trained)] = {(ids.tobytes(), mask.tobytes()): (len(ids), int(mask.sum())) for ids, mask in train}.values()
    top = y / 2 - 106
    svg += "".join(line([(238, middle), (262, y / 2 - 5)], "axis") for middle in middles) + box(262, top, 136, 200)
    svg += "".join(text(272, top + 22 + 78 * i, role, "bold") + "".join(
        text(272, top + 40 + 78 * i + 17 * j, words) for j, words in enumerate(textwrap.wrap(content, 17)))
        for i, (role, content) in enumerate(conversation))
    svg += text(272, top + 186, say(f"{count} ids, {trained} trained", f"{count} no, {trained} eğitilen"), "faint")
    names = ", ".join(file.stem for file in files)
    return (say("Six formats become one conversation", "Altı biçim tek bir sohbete dönüşür"),
            say(f"The records of {names} have other fields, and become the same {count} token ids with the same mask.",
                f"{names} kayıtlarının alanları başkadır; hepsi aynı {count} belirteç numarasına ve aynı maskeye "
                "dönüşür."), y - 4, svg)


def pieces(say: Say, data: Data) -> Picture:
    prepared = data(str(EXPERIMENTS / "conversation.jsonl"))
    [conversation] = read(EXPERIMENTS / "conversation.jsonl")
    svg, x, y, told = "", 2.0, 2, ""
    for piece in prepared.renderer.pieces(conversation):
        shown = piece.text.replace("\n", "↵")
        width = MONO * len(shown) + 10
        if x > 2 and (piece.text == "<|start_header_id|>" or x + width > WIDTH - 1):
            x, y = (2.0 if piece.control else 18.0), y + 29
        kind = f"{'trained soft' if piece.trained else 'axis' if piece.control else 'line'}"
        svg += box(x, y, width, 23, kind + " dashed" * piece.control)
        svg += text(x + 5, y + 16, shown, "mono" + " faint" * (piece.control and not piece.trained))
        x += width + 4
        told += f" [{shown}]" if piece.trained else ""
    y += 44
    for at, kind, name in ((2, "axis dashed", say("control token", "özel belirteç")),
                           (140, "line", say("text", "metin")), (230, "trained soft", say("trained", "eğitilen"))):
        svg += box(at, y, 24, 16, kind) + text(at + 32, y + 13, name)
    [(ids, mask)] = [prepared.train.document(0)]
    return (say("A conversation as pieces", "Parçalara ayrılmış bir sohbet"),
            say(f"{len(ids)} tokens, {int(mask.sum())} trained. Each turn is a header of control tokens with the role, "
                f"the content and a stop token. Trained are only the answers and their stop tokens:{told}.",
                f"{len(ids)} belirteç, {int(mask.sum())} eğitilen. Her ileti: rolü özel belirteçler arasında bir "
                f"başlık, içerik ve durma belirteci. Yalnızca yanıtlar ve durma belirteçleri eğitilir:{told}."),
            y + 20, svg)


def shift(say: Say, data: Data) -> Picture:
    prepared = data("heldout-questions.jsonl")
    shortest = np.argsort(prepared.train.lengths, kind="stable")[:2].tolist()
    batch = micro_batch(prepared.train, shortest)
    targets = torch.full_like(batch.tokens, -100)
    targets[batch.target_at] = batch.targets
    words, end, columns = tokens(prepared, batch.tokens.numpy()), batch.lengths[0], (2, 74, 226, 394)
    svg = "".join(text(x, 16, name, "bold", "end" if x == 394 else "start") for x, name in zip(columns, (
        say("position", "konum"), say("token", "belirteç"), say("target", "hedef"), say("counted", "kayba girer")),
        strict=True))
    for row, i in enumerate(range(end - 17, end + 2)):
        y, counted = 40 + 20 * row + 8 * (i >= end), int(targets[i]) != -100
        svg += line([(2, y - 19), (398, y - 19)]) if i == end else ""
        svg += box(222, y - 14, 120, 18, "trained soft") if counted else ""
        svg += line([(218, y + 2), (74 + MONO * len(words[i + 1]) + 6, y + 15)], "trained thin") if counted else ""
        svg += text(60, y, str(int(batch.positions[i])), "mono faint", "end") + text(74, y, words[i], "mono")
        svg += text(226, y, words[i + 1] if counted else "-100", "mono" + " faint" * (not counted))
        svg += text(394, y, say("yes", "evet") if counted else say("no", "hayır"), "" if counted else "faint", "end")
    answer = "".join(words[i] for i in range(end) if int(targets[i - 1]) != -100 and i).replace("␣", " ")
    return (say("Targets are the tokens, shifted by one", "Hedefler, bir kaydırılmış belirteçlerdir"),
            say(f"The end of a document and the start of the next. Each counted position has the next token as its "
                f"target, so together they say: {answer} All others have -100, also the last token of a document.",
                "Bir belgenin sonu ve sonrakinin başı. Kayba giren her konumun hedefi bir sonraki belirteçtir; hepsi "
                f"birden şunu söyler: {answer} Ötekilerde -100 vardır, belgenin son belirtecinde de."),
            40 + 20 * 18 + 18, svg)


def mean_of_means(say: Say, data: Data) -> Picture:
    questions = data("questions.jsonl").train
    small, large = (len(micro_batch(questions, list(of)).targets) for of in (range(1), range(1, 31)))
    step = small + large
    svg, y = "", 0
    for name, halves, each in (
            (say("sum of the losses, divided once", "kayıpların toplamı, bir kez bölünür"),
             (small / step, large / step), (step, step)),
            (say("mean of the two means", "iki ortalamanın ortalaması"), (.5, .5), (2 * small, 2 * large))):
        svg += text(2, y + 16, name, "bold")
        svg += box(2, y + 26, 396 * halves[0], 26, "leak")
        svg += box(3 + 396 * halves[0], y + 26, 395 * halves[1], 26, "own")
        for x, anchor, count, half, part in ((2, "start", small, halves[0], each[0]),
                                             (398, "end", large, halves[1], each[1])):
            svg += text(x, y + 71, say(f"{count} tokens, 1/{part} each", f"{count} belirteç, her biri 1/{part}"), "",
                        anchor)
            svg += text(x, y + 90, number(say, half, ".1%"), "faint", anchor)
        ratio = f"{each[1] / each[0]:.0f}"
        svg += text(200, y + 90, say(f"token for token {ratio} : 1", f"belirteç başına {ratio} : 1"), "", "middle")
        y += 118
    times = f"{large / small:.0f}"
    return (say("What a token weighs in a step of two micro-batches",
                "İki mikro yığınlık adımda bir belirtecin ağırlığı"),
            say(f"One micro-batch has {small} trained tokens, the other {large}. Divided once, each token weighs "
                f"1/{step}. With the mean of the two means, one of the first weighs {times} times one of the second.",
                f"Mikro yığınlardan birinde {small} eğitilen belirteç vardır, öbüründe {large}. Bir kez bölününce her "
                f"belirtecin ağırlığı 1/{step} olur. İki ortalamanın ortalamasında birincideki bir belirteç "
                f"ikincidekinin {times} katı sayılır."), y - 18, svg)


def schedule(say: Say, _: Data) -> Picture:
    steps, peak = 1000, OptimConfig().lr
    svg, at = chart(36, 30, 340, 170, [0, 250, 500, 750, steps], [0, .5, 1, 1.5, peak * 1e5], x_form=",.0f",
                    y_form=".1f", say=say)
    svg += text(2, 16, say("learning rate, in 1e-5", "öğrenme oranı (1e-5)"), "bold")
    svg += text(206, 236, say("step", "adım"), "faint", "middle")
    for name, kind in (("wsd", "leak thin dashed"), ("linear", "trained thin"), ("cosine", "own")):
        optim = OptimConfig(schedule=name)
        svg += line([at(step, learning_rate(step, steps, optim) * 1e5) for step in range(steps)], f"curve {kind}")
    warmup = OptimConfig().warmup_steps
    svg += line([at(warmup, 0), at(warmup, peak * 1e5)], "axis dashed")
    svg += text(at(warmup, 0)[0] + 6, at(0, .15)[1], say(f"warm-up: {warmup} steps", f"ısınma: {warmup} adım"),
                "faint")
    for x, kind, name, words in ((36, "own", "cosine", say("(default)", "(varsayılan)")),
                                 (228, "trained thin", "linear", ""), (322, "leak thin dashed", "wsd", "")):
        svg += line([(x, 256), (x + 22, 256)], f"curve {kind}") + text(x + 28, 260, name, "mono")
        svg += text(x + 28 + MONO * len(name) + 6, 260, words, "faint") if words else ""
    return (say(f"The learning rate over {steps} steps", f"{steps} adım boyunca öğrenme oranı"),
            say(f"It rises in {warmup} steps to {peak:g}, and falls as a cosine to 0. Beside it: linear, and wsd, "
                "which stays at the top and falls only at the end.",
                f"{warmup} adımda {peak:g} değerine çıkar, kosinüs eğrisiyle 0'a iner. Yanında linear ile wsd: wsd "
                "tepede kalır, yalnızca sonda iner."), 268, svg)


def recipe(say: Say, _: Data) -> Picture:
    steps = [(say("reward model", "ödül modeli"), say("learns what people prefer", "insan tercihlerini öğrenir")),
             (say("rejection sampling", "reddederek örnekleme"),
              say("of 10 to 30 answers it keeps one", "10–30 yanıttan birini seçer")),
             ("SFT", say("on the answers kept: this repository", "seçilen yanıtlarla: bu depo")),
             ("DPO", say("on the newest preferences", "en yeni tercihlerle")),
             (say("average", "ortalama"),
              say("of models from other data, settings", "başka veri ve ayarların modelleri"))]
    svg = ""
    for i, (name, does) in enumerate(steps):
        y = 2 + 66 * i
        svg += box(2, y, 300, 46, "trained soft" if name == "SFT" else "line")
        svg += text(14, y + 19, f"{i + 1}. {name}", "bold") + text(14, y + 37, does, "faint")
        svg += arrow([(150, y + 46), (150, y + 66)]) if i < 4 else ""
    svg += arrow([(302, 289), (326, 289), (326, 25), (302, 25)])
    svg += text(336, 154, say("six", "altı"), "bold") + text(336, 171, say("rounds", "tur"), "bold")
    return (say("A round of the Llama-3-Instruct recipe", "Llama-3-Instruct tarifinin bir turu"),
            say("Six rounds of: ", "Altı tur: ") + "; ".join(f"{name}: {does}" for name, does in steps) + ".", 314, svg)


def packing(say: Say, _: Data) -> Picture:
    sizes = np.array([3, 2, 4])
    short = SimpleNamespace(lengths=sizes, document=lambda i: (np.zeros(sizes[i], np.int64),) * 2)
    batch = micro_batch(short, [0, 1, 2])
    total, cell = len(batch.tokens), 18
    names = [f"{'abc'[int(n)]}{int(p)}" for n, p in zip(batch.document_ids, batch.positions, strict=True)]
    svg, same = "", torch.zeros(total, 1, total)
    for x, title, lengths in ((26, say("with boundaries", "sınırlarla"), batch.lengths),
                              (230, say("boundaries lost", "sınırlar yitince"), (total,))):
        documents = Documents.of_lengths(lengths)
        sees = attend(same, same, torch.eye(total)[:, None], documents)[:, 0] > 0  # values tell where they are from
        svg += text(x, 16, title, "bold")
        for i, row in enumerate(sees.tolist()):
            y = 46 + cell * i
            svg += text(x - 4, y + 13, names[i], "mono faint", "end")
            svg += text(x + cell * i + 9, 40, names[i][0], "mono faint", "middle")
            for j, seen in enumerate(row):
                kind = "own soft" if names[i][0] == names[j][0] else "leak"
                svg += box(x + cell * j + 1, y + 1, cell - 2, cell - 2, kind if seen else "line")
            svg += text(x + cell * i + 9, 66 + cell * total, str(int(documents.positions[i])), "mono", "middle")
        offsets = ", ".join(map(str, documents.offsets.tolist()))
        svg += text(x, 102 + cell * total, f"cu_seqlens {offsets}", "mono")
    svg += text(26, 83 + cell * total, say("positions", "konumlar"), "faint")
    svg += text(230, 83 + cell * total, say("positions", "konumlar"), "faint")
    y = 118 + cell * total
    svg += box(26, y, 16, 16, "own soft") + text(50, y + 13, say("its own document", "kendi belgesi"))
    svg += box(230, y, 16, 16, "leak") + text(254, y + 13, say("another document", "başka belge"))
    return (say("Which token sees which, in a pack of three documents", "Üç belgelik bir pakette kim kimi görür"),
            say("A row is a token, its columns are those that it sees. With boundaries there are three triangles, and "
                "positions restart in each document. Without them it is one triangle, in which b and c see other "
                "documents, and positions run on.",
                "Satır bir belirteçtir, sütunları gördükleridir. Sınırlar varken üç üçgen vardır, konumlar her belgede "
                "baştan başlar. Sınırlar yitince tek üçgen kalır: b ile c başka belgeleri de görür, konumlar sürer."),
            y + 20, svg)


def curve(say: Say, _: Data) -> Picture:
    rows = re.findall(r"(\d+) heldout-questions ([\d.]+)\s+\d+ heldout-articles ([\d.]+)",
                      printed_by("runs/demo/metrics"))
    steps, answers, articles = ([float(row[i]) for row in rows] for i in range(3))
    learnt = next(step for step, loss in zip(steps, answers, strict=True) if loss < 1.05 * min(answers))
    svg, ticks = "", steps[:: math.ceil(len(steps) / 7)]
    for y, name, kind, losses in ((26, say("loss on the answers", "yanıtlarda kayıp"), "own", answers),
                                  (212, say("loss on plain text", "düz yazıda kayıp"), "leak", articles)):
        step = 1 if max(losses) > 2 else .5
        ys = [step * i for i in range(math.ceil(max(losses) / step) + 1)]
        grid, at = chart(36, y, 346, 120, ticks, ys, x_form="g", y_form=".1f", say=say)
        svg += text(2, y - 12, name, "bold") + grid + line([at(learnt, ys[0]), at(learnt, ys[-1])], "axis dashed")
        points = [at(*pair) for pair in zip(steps, losses, strict=True)]
        if kind == "leak":
            svg += line([*points, at(steps[-1], losses[0]), points[0]], "leak soft")
            svg += text(at(steps[-1], 0)[0] - 8, at(0, (losses[0] + losses[-1]) / 2)[1] + 4, say(
                f"forgetting: {losses[-1] - losses[0]:.2f}", f"unutma: {number(say, losses[-1] - losses[0], '.2f')}"),
                "", "end")
        else:
            svg += text(at(learnt, 0)[0] + 6, y + 16, say("learnt", "öğrenildi"), "faint")
        svg += line(points, f"curve {kind}")
    svg += text(200, 368, say("step", "adım"), "faint", "middle")
    return (say("What the demo learns and forgets, by step", "Demonun adım adım öğrendiği ve unuttuğu"),
            say(f"The loss on held-out answers falls from {answers[0]} to {answers[-1]}, nearly all of it by step "
                f"{learnt:g}. The loss on plain text rises from {articles[0]} to {articles[-1]} nats a token.",
                f"Ayrılmış yanıtlarda kayıp {number(say, answers[0], 'g')} değerinden {number(say, answers[-1], 'g')} "
                f"değerine iner, neredeyse hepsi {learnt:g}. adıma dek. Düz yazıda belirteç başına "
                f"{number(say, articles[0], 'g')} nattan {number(say, articles[-1], 'g')} nata çıkar."), 376, svg)


def words(say: Say, _: Data) -> Picture:
    svg, y, told = text(2, 16, say("tokens a word", "sözcük başına belirteç"), "bold"), 30, []
    columns = [say("English", "İngilizce"), say("Turkish", "Türkçe"), say("Turkish, NFD", "Türkçe, NFD")]
    for row in printed_by("tokens.py").splitlines()[1:]:
        name, *costs = row.split()
        learnt = {"English": say("tokenizer from English alone", "yalnızca İngilizceden öğrenen"),
                  "both": say("tokenizer from both languages", "iki dilden öğrenen")}[name]
        svg += text(2, y + 18, learnt, "faint")
        for language, cost in zip(columns, map(float, costs), strict=True):
            y += 26
            shown = number(say, cost, ".2f")
            svg += text(88, y + 15, language, "", "end")
            svg += box(96, y, 44 * cost, 20, "own" if language == columns[0] else "leak")
            svg += text(102 + 44 * cost, y + 15, shown)
            told.append(f"{learnt}, {language}: {shown}")
        y += 36
    return (say("Tokens a word in English and Turkish", "İngilizcede ve Türkçede sözcük başına belirteç"),
            "; ".join(told) + ".", y - 6, svg)


def intervals(say: Say, _: Data) -> Picture:
    shares = [.9, .92, .94, .96, .98, 1]
    _, at = chart(96, 30, 286, 118, shares, [0, 1], x_form=".0%", y_form="", say=say)
    svg = text(2, 16, say("right answers, and the 95% interval", "doğru yanıtlar ve %95 güven aralığı"), "bold")
    told = []
    for share in shares:
        x = at(share, 0)[0]
        svg += line([(x, 30), (x, 148)]) + text(x, 166, number(say, share, ".0%"), "faint", "middle")
    for count, rows in groupby([(200, .95), (200, .98), (2000, .95), (2000, .98)], key=lambda row: row[0]):
        for i, (_, share) in enumerate(rows):
            low, high = wilson(share * count, count)
            y, kind = 46 + 26 * i + 60 * (count > 200), ("own", "leak")[i]
            svg += line([(at(end, 0)[0], y) for end in (low, high)], f"curve {kind}")
            svg += box(at(share, 0)[0] - 4, y - 4, 8, 8, kind)
            told.append(f"{number(say, count, ',')}: {number(say, share, '.0%')}, {number(say, low, '.1%')} "
                        f"- {number(say, high, '.1%')}")
        svg += text(74, y - 9, number(say, count, ","), "", "end")
    svg += text(74, 166, say("questions", "soru"), "faint", "end")
    return (say("With 200 questions, 95% and 98% cannot be told apart", "200 soruda %95 ile %98 ayırt edilemez"),
            say("Questions, share of right answers and its interval: ", "Soru sayısı, doğruların payı ve aralığı: ")
            + "; ".join(told) + ".", 172, svg)


PICTURES = (base_and_instruct, formats, pieces, shift, mean_of_means, schedule, recipe, packing, curve, words,
            intervals)


def draw(out: Path) -> None:
    """Write all pictures into the folder `out`."""
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), countries=COUNTRIES, seed=0)

        @cache
        def data(file: str) -> Prepared:
            return prepare(load([str(EXPERIMENTS / "look.toml"), "--model.path", folder, "--data.train",
                                 str(Path(folder) / file), "--data.cache", str(Path(folder) / "cache")]), quiet=True)

        for picture in PICTURES:
            for language, suffix in enumerate(("", ".tr")):
                title, told, height, svg = picture(lambda *texts, language=language: texts[language], data)
                file = out / f"{picture.__name__.replace('_', '-')}{suffix}.svg"
                file.write_text(
                    f'<svg xmlns="http://www.w3.org/2000/svg" role="img" lang="{("en", "tr")[language]}" '
                    f'width="{1.25 * WIDTH:g}" height="{1.25 * height:g}" viewBox="0 0 {WIDTH} {height:g}">\n'
                    f"<title>{escape(title)}</title>\n<desc>{escape(told)}</desc>\n"
                    f"<style>\n{style('colours')}{STYLE}</style>\n{svg}</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "images")
