"""Instructions asked and checked: the file's layout, strict and loose, and the figures."""

import json

import pytest

from minisft.__main__ import main
from minisft.data.conversation import Turn
from minisft.errors import UserError
from minisft.evals.instructions import CHECKS, InstructionPrompt, check, describe, figures, load, loosely, strictly
from minisft.evals.language import detect

NO_COMMA = {"key": 1, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
TWO = {"key": 2, "prompt": "Söyle.", "language": "tr",
       "instruction_id_list": ["keywords:existence", "length_constraints:number_words"],
       # Hugging Face's copy of the public file has every parameter in every object, null if it has no meaning
       "kwargs": [{"keywords": ["ılık"], "num_words": None}, {"num_words": 2, "relation": "at least"}]}


class Parrot:
    """Answers from a list, and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def answer(self, conversations, *, max_new_tokens):
        self.asked += [(turns, max_new_tokens) for turns in conversations]
        return [self.answers.pop(0) for _ in conversations]


def write(folder, *records):
    file = folder / "asked.jsonl"
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


def test_figures_count_prompts_and_instructions(tmp_path):
    parrot = Parrot("a, b", "ILIK")
    found = figures(parrot, load(write(tmp_path, NO_COMMA, TWO)), max_new_tokens=7, batch=1)
    assert parrot.asked == [((Turn("user", "Say it."),), 7), ((Turn("user", "Söyle."),), 7)]
    strict = found["strict"]
    assert (strict["prompts"]["rate"], strict["prompts"]["count"]) == (0, 2)
    assert (strict["instructions"]["rate"], strict["instructions"]["count"]) == (1 / 3, 3)
    assert found["by_instruction"]["keywords:existence"]["rate"] == 1
    assert {name: figure["count"] for name, figure in found["by_language"].items()} == {"en": 1, "tr": 1}
    assert "instructions, strict 33.3% (6.1% to 79.2%) of 3" in describe(found)
    assert found["answers"] == [{"key": 1, "answer": "a, b", "strict": [False], "loose": [False]},
                                {"key": 2, "answer": "ILIK", "strict": [True, False], "loose": [True, False]}]


def test_the_interval_is_wilsons():
    stats = pytest.importorskip("scipy.stats")
    asked = InstructionPrompt(1, "?", "en", (("punctuation:no_comma", {}),))
    found = check([asked] * 30, ["yes"] * 13 + ["a, b"] * 17)["strict"]["prompts"]
    wanted = stats.binomtest(13, 30).proportion_ci(method="wilson")
    assert found["interval"] == pytest.approx([wanted.low, wanted.high], abs=1e-6)


@pytest.mark.parametrize(("answer", "strict", "loose"), [
    ('{"a": 1}', True, True), ('Sure:\n{"a": 1}', False, True), ('{"a": 1}\nEnjoy!', False, True),
    ('Sure:\n{"a": 1}\nEnjoy!', False, True), ('**{"a": 1}**', False, True), ("Sure, no JSON", False, False),
    (" \n", False, False),
])
def test_loose_forgives_a_frame(answer, strict, loose):
    asked = InstructionPrompt(1, "?", "en", (("detectable_format:json_format", {}),))
    assert strictly(answer, asked) == [strict]
    assert loosely(answer, asked) == [loose]


def test_an_empty_answer_follows_nothing():
    asked = InstructionPrompt(1, "?", "en", (("punctuation:no_comma", {}),))
    assert strictly(" \n", asked) == loosely(" \n", asked) == [False]


def test_strict_and_loose_are_ifevals():
    pytest.importorskip("immutabledict")
    pytest.importorskip("langdetect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nltk.download", lambda *_, **__: True)
        patch.setattr("nltk.data.find", lambda *_, **__: True)
        oracle = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    from itertools import product

    names = ("punctuation:no_comma", "startend:quotation", "detectable_format:title", "startend:end_checker")
    kwargs = [{}, {}, {}, {"end_phrase": "The end."}]
    asked = InstructionPrompt(1, "?", "en", tuple(zip(names, kwargs, strict=True)))
    pieces = ("Sure, here:", '"<<A>> one', "*<<B>>* two.", 'The end."', "The *end*.", "", "Bye, now")
    for answer in map("\n".join, product(pieces, repeat=3)):
        given = oracle.InputExample(1, list(names), "?", kwargs)
        wanted = oracle.process_results({"key": 1, "instruction_id_list": list(names), "prompt": "?", "kwargs": kwargs},
                                        [answer])
        theirs = oracle.test_instruction_following_strict(given, answer).follow_instruction_list
        assert strictly(answer, asked) == theirs
        assert loosely(answer, asked) == wanted["inst_level_loose_acc"], answer


def test_an_unknown_instruction_is_refused_by_name_or_counted(tmp_path):
    strange = {**NO_COMMA, "key": 3, "instruction_id_list": ["poetry:rhyme", "punctuation:no_comma"],
               "kwargs": [{}, {}]}
    only = {**NO_COMMA, "key": 4, "instruction_id_list": ["poetry:rhyme"]}
    file = write(tmp_path, NO_COMMA, strange, only)
    with pytest.raises(UserError, match=r"asked.jsonl:2: no check for the instruction 'poetry:rhyme'"):
        load(file)
    found = load(file, skip_unknown=True)
    assert [asked.key for asked in found.prompts] == [1, 3]
    assert found.skipped == {"poetry:rhyme": 2}
    assert len(load(file, limit=1).prompts) == 1
    with pytest.raises(UserError, match="no prompts with instructions"):
        load(write(tmp_path, only), skip_unknown=True)


@pytest.mark.parametrize(("record", "message"), [
    ({**NO_COMMA, "prompt": 5}, "needs a key, and a prompt that is text"),
    ({**NO_COMMA, "kwargs": []}, "needs instruction_id_list, a list of names, and kwargs, an object for each name"),
    ({**NO_COMMA, "kwargs": [[]]}, "an object for each name"),
    ({**NO_COMMA, "instruction_id_list": []}, "needs instruction_id_list"),
    ({**NO_COMMA, "kwargs": [{"x": 2}]}, "takes no parameters; found x"),
    ({**NO_COMMA, "language": "TR"}, "cannot detect the language 'TR'; choose from ar,"),
    ({**NO_COMMA, "language": ["tr"]}, "cannot detect the language \"['tr']\""),
])
def test_a_broken_record_is_named_with_its_line(tmp_path, record, message):
    with pytest.raises(UserError, match=r"asked.jsonl:2: ") as error:
        load(write(tmp_path, TWO, record))
    assert message in str(error.value)


def test_shipped_prompts_cover_what_can_be_checked_in_both_languages():
    prompts = load("instructions").prompts
    assert len(prompts) == 30
    used = {name for asked in prompts for name, _ in asked.instructions}
    assert set(CHECKS) - used == {"keywords:letter_frequency", "combination:repeat_prompt",
                                  "change_case:capital_word_frequency"}
    assert [asked.language for asked in prompts] == ["en"] * 15 + ["tr"] * 15
    for asked in prompts:
        to_turkish = any(name == "language:response_language" for name, _ in asked.instructions)
        assert detect(asked.prompt) == {"en" if to_turkish else asked.language}, asked.prompt


def test_command_checks_a_models_answers(tmp_path, capsys, base):
    file, report = write(tmp_path, NO_COMMA, TWO), tmp_path / "r.json"
    assert main(["eval", str(base), "--instructions", str(file), "--max-new-tokens", "4", "--template", "llama3",
                 "--json", str(report)]) == 0
    assert f"instructions followed ({file})" in capsys.readouterr().out
    found = json.loads(report.read_text(encoding="utf-8"))["instructions"]
    assert (found["max_new_tokens"], found["strict"]["instructions"]["count"]) == (4, 3)
    file.write_text('{"key": 1, "prompt": "?", "instruction_id_list": ["poetry:rhyme"], "kwargs": [{}]}\n')
    assert main(["eval", "nowhere", "--instructions", str(file)]) == 2
    assert "leave such instructions out with --skip-unknown" in capsys.readouterr().err
