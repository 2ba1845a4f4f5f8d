"""Log-likelihoods of choices are those of a plain transformers model, and the figures follow from them.

The oracle below asks one (prompt, choice) at a time: text spelled out in the test, encoded by transformers, all
logits, log_softmax. If it is installed and SmolLM2 is at hand, lm-evaluation-harness is compared, too.
"""

import json
import math
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisft.__main__ import main
from minisft.errors import UserError
from minisft.evals import choices
from minisft.evals.choices import ChoicePrompt, encode, figures, load, log_likelihoods
from minisft.evals.questions import ChoiceQuestion, read
from minisft.evals.rates import wilson
from minisft.generate.assistant import Assistant

transformers = pytest.importorskip("transformers")

HERE = Path(__file__).parent / "oracles" / "questions"
SKY, KITCHEN, TOOLS = (str(HERE / name) for name in ("night_sky_test.csv", "TurkishMMLU_Kitchen.json",
                                                     "tools_train.jsonl"))

SKY_SHOT = ("How many moons does the planet Mars have?\nA. None\nB. One\nC. Two\nD. Seven\nAnswer: C\n\n")
SKY_THIRD = ("Why do stars twinkle?\nA. They turn.\nB. The air above us moves.\nC. They are switched on and off.\n"
             "D. Clouds of dust pass.\nAnswer:")
SKY_OPENING = "The following are multiple choice questions (with answers) about night sky.\n\n"
KITCHEN_SECOND = ("Soru: Aşağıdakilerden hangisi bir sebze değildir?\nA. Ispanak\nB. Pırasa\nC. Kiraz\nD. Lahana\n"
                  "E. Şalgam\nCevap:")
KITCHEN_SHOT = ("Soru: Türk kahvesi geleneksel olarak hangi kapta pişirilir?\nA. Cezve\nB. Güveç\nC. Sürahi\nD. Tepsi\n"
                "E. Kevgir\nCevap: A\n\n")
TOOL = "Question: Which tool drives a nail into wood?\nAnswer:"
# file, question, options of `load`, prompt, what is scored
CASES = {
    "mmlu": (SKY, 2, {}, SKY_OPENING + SKY_THIRD, [" A", " B", " C", " D"]),
    "mmlu, a shot": (SKY, 2, {"shots": 1}, SKY_OPENING + SKY_SHOT + SKY_THIRD, [" A", " B", " C", " D"]),
    "turkish": (KITCHEN, 1, {"shots": 1}, KITCHEN_SHOT + KITCHEN_SECOND, [" A", " B", " C", " D", " E"]),
    "turkish, by text": (KITCHEN, 1, {"style": "text"}, "Soru: Aşağıdakilerden hangisi bir sebze değildir?\nCevap:",
                         [" Ispanak", " Pırasa", " Kiraz", " Lahana", " Şalgam"]),
    "arc": (TOOLS, 0, {}, TOOL, [" a spoon", " a hammer", " a sieve"]),
    "arc, two shots": (TOOLS, 0, {"shots": 2}, "Question: What is a saw used for?\nAnswer: cutting\n\nQuestion: Which "
                       "one measures length?\nAnswer: a ruler\n\n" + TOOL, [" a spoon", " a hammer", " a sieve"]),
    "arc by letter": (TOOLS, 1, {"style": "letter"}, "Question: What is a saw used for?\nA. cutting\nB. gluing\n"
                      "Answer:", [" A", " B"]),
    "mmlu in Turkish words": (SKY, 2, {"language": "tr"}, "Soru: " + SKY_THIRD.replace("Answer:", "Cevap:"),
                              [" A", " B", " C", " D"]),
}


@cache
def theirs(folder):
    return (transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            transformers.AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def assistant(base):
    return Assistant.load(base, template="llama3")


@torch.no_grad()
def oracle(folder, prompt, continuation, *, begin=True):
    """log p(continuation | prompt) of texts; without `begin`, special tokens are written out in `prompt`."""
    model, tokenizer = theirs(folder)
    whole = tokenizer(prompt + continuation, add_special_tokens=begin).input_ids
    known = len(tokenizer(prompt, add_special_tokens=begin).input_ids)
    log_p = model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
    return sum(log_p[at - 1, whole[at]].item() for at in range(known, len(whole)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_log_likelihoods_are_those_of_transformers(base, assistant, case, batch_tokens):
    file, index, options, prompt, scored = CASES[case]
    found = figures(assistant, load([file], **options), batch_tokens=batch_tokens)["answers"][index]
    expected = [oracle(base, prompt, continuation) for continuation in scored]
    assert found["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    assert found["chosen"]["acc"] == expected.index(max(expected))


@pytest.mark.parametrize(("file", "index", "options", "turns", "scored"), [
    (KITCHEN, 1, {}, [KITCHEN_SECOND], ["A", "B", "C", "D", "E"]),
    (SKY, 2, {"shots": 1}, [SKY_OPENING + SKY_SHOT.removesuffix(" C\n\n"), "C", SKY_THIRD], ["A", "B", "C", "D"]),
    (TOOLS, 0, {}, [TOOL], ["a spoon", "a hammer", "a sieve"]),
])
def test_chat_asks_in_turns(base, assistant, file, index, options, turns, scored):
    prompt = "<|begin_of_text|>"
    for role, text in zip(["user", "assistant"] * 2, [*turns, None], strict=False):
        prompt += f"<|start_header_id|>{role}<|end_header_id|>\n\n" + ("" if text is None else f"{text}<|eot_id|>")
    found = figures(assistant, load([file], **options), chat=True)["answers"][index]
    expected = [oracle(base, prompt, said, begin=False) for said in scored]
    assert found["log_likelihoods"] == pytest.approx(expected, abs=1e-4)


def test_special_tokens_in_a_question_stay_text(assistant):
    question = ChoiceQuestion("Say <|eot_id|>", ("<|end_of_text|>", "b"), 0, "s", "arc", "en", "f", 1)
    for prompt, continuation in (*encode(assistant, ChoicePrompt(question, "text"), chat=False),
                                 *encode(assistant, ChoicePrompt(question, "text"), chat=True)):
        text = assistant.renderer.tokenizer.decode([*prompt, *continuation])
        assert text.count("Say <|eot_id|>") == 1
        assert 318 not in prompt[: len(prompt) // 2]  # the token <|eot_id|>, which ends the user's turn
        assert 310 not in continuation  # the token <|end_of_text|>


def test_letters_share_one_document_and_the_head_sees_only_what_is_scored(assistant, monkeypatch):
    streams, rows = [], []
    forward, linear = type(assistant.model).forward, choices.logits
    monkeypatch.setattr(type(assistant.model), "forward", lambda self, tokens, *rest: (
        streams.append(len(tokens)), forward(self, tokens, *rest))[1])
    monkeypatch.setattr(choices, "logits", lambda x, head: (rows.append(len(x)), linear(x, head))[1])
    prompt = list(range(40))
    log_likelihoods(assistant.model, [(prompt, [letter]) for letter in (65, 66, 67, 68)])
    assert (streams, rows) == ([40], [4])
    log_likelihoods(assistant.model, [(prompt, [65, 1]), (prompt, [66, 2, 3])])
    assert (streams[1:], rows[1:]) == ([41 + 42], [5])


def test_figures_follow_from_log_likelihoods(assistant, monkeypatch):
    asked = load([TOOLS])  # "a spoon" 7, "a hammer" 8, "a sieve" 7
    sums = [-7.0, -7.2, -9.0, -1.0, -1.0, -3.0, -2.0, -9.0, -9.0]
    monkeypatch.setattr(choices, "log_likelihoods", lambda *_, **__: sums)
    found = figures(assistant, asked)
    assert [answer["chosen"] for answer in found["answers"]] == [
        {"acc": 0, "acc_norm": 1, "acc_bytes": 1},  # -7/7 < -7.2/8
        {"acc": 0, "acc_norm": 0, "acc_bytes": 0},  # the first of equals, of one length
        {"acc": 1, "acc_norm": 1, "acc_bytes": 1}]  # -2/8 > -3/7, -9/34
    assert (found["questions"], found["acc"], found["acc_norm"]) == (3, 1 / 3, 2 / 3)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)
    assert found["acc_interval"] == list(wilson(1, 3))
    assert found["acc_norm_interval"] == list(wilson(2, 3))


def test_bytes_are_not_characters(assistant, monkeypatch):
    question = ChoiceQuestion("?", ("şşşş", "abcd"), 0, "s", "arc", "en", "f", 1)
    monkeypatch.setattr(choices, "log_likelihoods", lambda *_, **__: [-6.0, -5.0])
    found = figures(assistant, [ChoicePrompt(question, "text")])["answers"][0]["chosen"]
    assert found == {"acc": 1, "acc_norm": 1, "acc_bytes": 0}  # -6/4 < -5/4, but -6/8 > -5/4


def test_subjects_have_their_own_figures(assistant):
    found = figures(assistant, load([SKY, KITCHEN, SKY]))
    assert {name: part["questions"] for name, part in found["subjects"].items()} == {"night sky": 8, "Kitchen": 3}
    hits = sum(part["questions"] * part["acc"] for part in found["subjects"].values())
    assert found["acc"] == pytest.approx(hits / 11)


@given(count=st.integers(1, 2000), data=st.data())
def test_the_interval_is_where_the_share_is_within_its_deviations(count, data):
    hits = data.draw(st.integers(0, count))
    for bound in wilson(hits, count):  # Wilson: |hits / n - p| = z sqrt(p (1 - p) / n) at both ends
        distance = 1.959964 * math.sqrt(bound * (1 - bound) / count)
        assert abs(hits / count - bound) == pytest.approx(distance, abs=1e-7)
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1


def texts(asked):
    return [[shot.text for shot in each.shots] for each in asked]


def test_a_question_is_never_its_own_shot(tmp_path):
    sky = read(SKY)
    for pool in ([], [SKY]):
        asked = load([SKY], shots=3, shots_from=pool)
        assert texts(asked) == [[q.text for j, q in enumerate(sky) if j != i] for i in range(4)]
    copy = tmp_path / "other_name.csv"  # the same question in another place is the same question
    copy.write_bytes(Path(SKY).read_bytes())
    assert texts(load([SKY], shots=1, shots_from=[str(copy)]))[0] == [sky[1].text]


def test_shots_are_of_the_same_subject_if_there_are_any():
    assert texts(load([SKY, KITCHEN], shots=1)) == [
        [read(SKY)[1].text], *[[read(SKY)[0].text]] * 3, [read(KITCHEN)[1].text], *[[read(KITCHEN)[0].text]] * 2]
    assert texts(load([SKY], shots=1, shots_from=[KITCHEN, TOOLS])) == [[read(KITCHEN)[0].text]] * 4
    with pytest.raises(UserError) as error:  # no subject is helped out with another's questions
        load([SKY, KITCHEN], shots=1, shots_from=[KITCHEN])
    assert str(error.value) == (f"{SKY}:1: --shots 1, but there are 0 other questions about 'night sky'; ask for "
                                "fewer, or name files that have them with --shots-from")


def test_a_limit_is_of_each_file_and_not_of_the_shots():
    asked = load([SKY, KITCHEN], limit=1, shots=2)
    assert [each.question.line for each in asked] == [1, 2]
    assert texts(asked) == [[q.text for q in read(file)[1:3]] for file in (SKY, KITCHEN)]


def test_too_long_for_the_model_is_refused(assistant):
    question = ChoiceQuestion("word " * 1100, ("a", "b"), 0, "s", "arc", "en", "f.jsonl", 7)
    with pytest.raises(UserError) as error:
        figures(assistant, [ChoicePrompt(question, "text")])
    assert str(error.value).startswith("f.jsonl:7: ")
    assert str(error.value).endswith(" tokens with its 0 shots, but the model reads 1024; ask with fewer --shots, or "
                                     "leave the question out")


def test_broken_weights_are_refused(base):
    broken = Assistant.load(base, template="llama3")
    broken.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the model's log-likelihoods are not finite: its weights are broken"):
        figures(broken, load([TOOLS]))


def test_log_likelihoods_are_not_those_of_rounded_logits():
    """Logits near 20 are 0.125 apart in bf16; these are 1e-3 apart, and the best is not the first."""
    head = torch.zeros(64, 32, dtype=torch.bfloat16)
    head[:, 0], head[:, 1] = 20, torch.arange(64) * 2**-10
    hidden = torch.ones(3, 32, dtype=torch.bfloat16)
    words = torch.tensor([0, 40, 63])
    truth = (hidden.double() @ head.double().T).log_softmax(dim=-1)[0, words]
    assert (choices._log_p(hidden, head, rows=torch.arange(3), words=words) - truth).abs().max() < 1e-5


def test_the_command(base, tmp_path, capsys):
    assert main(["eval", str(base), "--choices", SKY, KITCHEN, "--shots", "1", "--json", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["precision"] == "fp32"
    assert found["choices"]["questions"] == 7
    assert found["choices"]["answers"][2]["log_likelihoods"] == pytest.approx(
        [oracle(base, SKY_OPENING + SKY_SHOT + SKY_THIRD, letter) for letter in (" A", " B", " C", " D")], abs=1e-4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("multiple choice (mmlu in en, turkish_mmlu in tr), 1 shots; accuracy in % and its 95% "
                        "interval")
    low, high = wilson(round(7 * found["choices"]["acc"]), 7)
    share = f"{100 * found['choices']['acc']:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    assert lines[-1].split() == ["all", "7", "22.9", *share.split() * 3]


def test_questions_that_stand_twice_are_counted(base, tmp_path, capsys):
    """They would be taken for more evidence than there is."""
    again = Path(SKY).read_text().replace("Mars have?", "Mars have? ")  # asked without the blank
    (tmp_path / "more.csv").write_text(again + "Which planet is red?,Mars,Venus,Pluto,Io,A\n")
    assert main(["eval", str(base), "--choices", SKY, str(tmp_path / "more.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "questions that stand twice, which makes the intervals too narrow: 4 "
        f"({tmp_path}/more.csv:1 is {SKY}:1, ...)")
    assert main(["eval", str(base), "--choices", SKY]) == 0
    assert "twice" not in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "nothing to evaluate; give --choices FILE ..., --instructions FILE or --data FILE ..."),
    (["--choices", "no.csv"], "no.csv: No such file or directory (remedy: name a file of questions that can be read)"),
    (["--choices", SKY, "--shots", "9"], f"{SKY}:1: --shots 9, but there are 3 other questions about 'night sky'; ask "
                                         "for fewer, or name files that have them with --shots-from"),
    (["--choices", SKY, "--shot", "9"], "unknown argument --shot; `minisft eval --help` lists the options"),
    (["--choices", SKY, "--json", "none/a.json"], "--json none/a.json: folder none does not exist; create it first"),
    (["--choices", SKY, "--json", str(HERE)], f"--json {HERE}: is a folder; name a file"),
    (["--choices", SKY, "--chat", "--template", "jinja"], "--template: no template is called 'jinja'; choose with "
     "--template: llama3, llama3.1, chatml, alpaca, text; or write your own and name its file in --templates"),
])
def test_bad_input_is_one_line(base, capsys, arguments, message):
    assert main(["eval", str(base), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message}\n")


def test_figures_do_not_overwrite_the_questions(base, tmp_path, capsys):
    copy = tmp_path / "sky.csv"
    copy.write_bytes(Path(SKY).read_bytes())
    assert main(["eval", str(base), "--choices", str(copy), "--json", str(copy)]) == 2
    assert capsys.readouterr().err == (f"error: --json {copy}: this command reads that file and would overwrite it; "
                                       "name another file\n")
    assert copy.read_bytes() == Path(SKY).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not {"MINISFT_SMOLLM2", "MINISFT_DATA"} <= os.environ.keys(),
                    reason="MINISFT_SMOLLM2 and MINISFT_DATA name no model and data")
@pytest.mark.parametrize(("file", "options"), [
    ("turkish_mmlu_dev/TurkishMMLU_Geography.json", {"shots": 1}),
    ("turkish_mmlu_dev/TurkishMMLU_Biology.json", {"style": "text"}),
    ("mmlu_dev/astronomy_dev.csv", {}),
    ("mmlu_dev/professional_psychology_dev.csv", {"style": "text"}),
])
def test_log_likelihoods_are_those_of_lm_evaluation_harness(file, options):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = os.environ["MINISFT_SMOLLM2"]
    prompts = load([str(Path(os.environ["MINISFT_DATA"]) / "eval" / file)], **options)
    found = figures(Assistant.load(folder), prompts)["answers"]
    pairs = [(prompt.text(), f" {choice}") for prompt in prompts for choice in prompt.choices(prompt.question)]
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4)
    expected = [total for total, _ in model.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)]
    assert [total for answer in found for total in answer["log_likelihoods"]] == pytest.approx(expected, abs=1e-3)
