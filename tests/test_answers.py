"""Question files are read and answered in FastChat's layout, turn after turn, and an interrupted command resumes."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from oracles.tiny_llama import write_tiny_llama

from minisft.__main__ import main
from minisft.data.conversation import Turn
from minisft.errors import UserError
from minisft.evals.answers import answer_turns, locked, model_name, read_answers, unanswered, write_answers
from minisft.evals.language import detect
from minisft.evals.questions import Prompt, json_lines, load_prompts, prompt_file
from minisft.generate.assistant import Assistant

QUESTIONS = [Prompt(1, ("one?", "two?")), Prompt(2, ("only?",)), Prompt("x", ("eins?", "zwei?", "drei?"))]


class Echo:
    """Answers with all turns so far, in capitals; a token is a character."""

    def __init__(self, patience=99):
        self.patience = patience

    def answer_with_cut(self, conversations, *, max_new_tokens):
        self.patience -= 1
        if self.patience < 0:
            raise KeyboardInterrupt
        echoes = ["".join(turn.content for turn in turns).upper() for turns in conversations]
        return [(echo[-max_new_tokens:], len(echo) >= max_new_tokens) for echo in echoes]


def test_each_turn_sees_the_answers_before_it():
    seen = []

    class Scribe(Echo):
        def answer_with_cut(self, conversations, **options):
            seen.extend(conversations)
            return super().answer_with_cut(conversations, **options)

    turns, cut = zip(*answer_turns(Scribe(), QUESTIONS, max_new_tokens=20), strict=True)
    assert turns[0] == ["ONE?", "ONE?ONE?TWO?"]
    assert turns[1] == ["ONLY?"]
    assert turns[2][2] == "EINS?EINS?ZWEI?EINS?EINS?ZWEI?DREI?"[-20:]
    assert cut == ([False, False], [False], [False, False, True])
    assert (Turn("user", "one?"), Turn("assistant", "ONE?"), Turn("user", "two?")) in seen


def test_a_line_has_fastchats_fields(tmp_path):
    write_answers(Echo(), QUESTIONS, tmp_path / "a.jsonl", model_id="m", max_new_tokens=10, batch=2)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["question_id"] for line in lines] == [1, 2, "x"]
    assert set(lines[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert lines[0]["choices"] == [{"index": 0, "turns": ["ONE?", "E?ONE?TWO?"], "cut": [False, True]}]
    assert len({line["answer_id"] for line in lines}) == 3
    found = read_answers(tmp_path / "a.jsonl")
    assert (found.model_id, found.turns[2]) == ("m", ("ONLY?",))
    assert found.all_cut == [False, True, False, False, True, True]


def test_cut_is_known_from_the_tokens_and_not_from_the_text(base, tmp_path, monkeypatch):
    """Five tokens spell a word that is one: encoded again, its text would not tell how long the answer was."""
    assistant = Assistant.load(base, template="llama3")
    encode, asked = assistant.renderer.tokenizer.encode, (Turn("user", "only?"),)
    spelled = [token for letter in "hello" for token in encode(letter)]
    assert len(encode("hello")) < len(spelled) == 5
    context = len(assistant.renderer.prompt(asked)) + 5

    def cut(limit, most=context):
        monkeypatch.setattr(assistant.model, "config", replace(assistant.model.config, max_position_embeddings=most))
        monkeypatch.setattr("minisft.generate.assistant.generate", lambda *_, **options: [spelled])
        (file := tmp_path / "a.jsonl").unlink(missing_ok=True)
        write_answers(assistant, QUESTIONS[1:2], file, model_id="m", max_new_tokens=limit)
        assert assistant.answer([asked], max_new_tokens=limit) == [*read_answers(file).turns[2]] == ["hello"]
        return read_answers(file).cut[2]

    assert cut(5) == [True], "the limit"
    assert cut(99) == [True], "the context is full"
    assert cut(6, context + 1) == [False], "the sixth token ended it"


def test_a_models_answer_is_cut_unless_a_stop_token_ends_it(base):
    assistant = Assistant.load(base, template="llama3")
    room = assistant.model.config.max_position_embeddings
    for text in ("hello", "a" * 950):
        turns = (Turn("user", text),)
        prompt = assistant.renderer.prompt(turns)
        for limit in (1, 7, room):
            tokens = list(assistant.tokens(turns, max_new_tokens=limit))
            [(answer, cut)] = assistant.answer_with_cut([turns], max_new_tokens=limit)
            assert answer == assistant.renderer.tokenizer.decode(tokens)
            assert cut == (len(tokens) == limit or len(prompt) + len(tokens) == room)


def test_an_interrupted_command_resumes_after_the_last_whole_line(tmp_path):
    whole, file = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    write_answers(Echo(), QUESTIONS, whole, model_id="m", batch=1)
    with pytest.raises(KeyboardInterrupt):
        write_answers(Echo(patience=3), QUESTIONS, file, model_id="m", batch=1)
    assert [question.id for question in unanswered(QUESTIONS, file, model_id="m")] == ["x"]
    with open(file, "ab") as out:
        out.write(b'{"question_id": "x", "model_id": "m", "cho')  # a machine that stopped in a line
    write_answers(Echo(), QUESTIONS, file, model_id="m", batch=1)
    assert read_answers(file) == read_answers(whole)
    assert unanswered(QUESTIONS, file, model_id="m") == []
    with pytest.raises(UserError, match="holds the answers of 'm', not of 'other'; give another --out"):
        unanswered(QUESTIONS, file, model_id="other")


def test_two_commands_do_not_answer_into_one_file(tmp_path, base, capsys):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "turns": ["Hi"]}))
    file = tmp_path / "a.jsonl"
    command = ["answer", str(base), "--questions", str(tmp_path / "q.jsonl"), "--out", str(file), "--template",
               "llama3", "--max-new-tokens", "1"]
    with locked(file):
        assert main(command) == 2
        assert capsys.readouterr().err == (f"error: {file}: another process is writing answers there; wait for it, or "
                                           "give another --out\n")
        assert file.read_bytes() == b""
    assert not file.exists()
    assert main(command) == main(command) == 0
    assert len(file.read_text().splitlines()) == 1
    file.chmod(0o444)
    assert main(command) == 0, "what is there is described without writing"


@pytest.mark.parametrize("content", [
    "my notes\nwithout a newline at the end", '{"question_id": 1, "turns": ["a question"]}',
    '{"question_id": 1, "turns": ["a question"]}\n{"question_id": 2, "turns": ["cut', "{}", "[",
    '[{"question_id": 1, "model_id": "m", "choices": [{"index": 0, "turns": ["an answer"]}]}]\n',
])
def test_a_file_of_another_kind_stays_as_it_is(tmp_path, content):
    (file := tmp_path / "notes.txt").write_text(content)
    with pytest.raises(UserError, match=r"notes\.txt"):
        unanswered(QUESTIONS, file, model_id="m")
    assert file.read_text() == content


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path):
    whole, file = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    write_answers(Echo(), QUESTIONS, whole, model_id="m")
    file.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:2])[:-1])
    write_answers(echo := Echo(), QUESTIONS, file, model_id="m")
    assert echo.patience == 99 - 3, "only the last question was asked, in three turns"
    assert read_answers(file) == read_answers(whole)


@pytest.mark.parametrize(("line", "message"), [
    ('{"question_id": 1, "model_id": "m"}', "choices must be a list"),
    ('{"question_id": 1, "choices": []}', "needs question_id, and model_id that is text"),
    ('{"question_id": 1, "model_id": "m", "choices": [{"turns": "x"}]}', r"choices\[0\].turns: must be text in a list"),
    ("not JSON", "bad JSON"),
])
def test_broken_answers_are_named_with_their_line(tmp_path, line, message):
    good = '{"question_id": 0, "model_id": "m", "choices": [{"turns": ["x"]}]}\n'
    (tmp_path / "a.jsonl").write_text(good + line + "\n")
    with pytest.raises(UserError, match=rf"a.jsonl:2: .*{message}"):
        read_answers(tmp_path / "a.jsonl")


def test_answers_of_two_models_in_one_file_are_refused(tmp_path):
    lines = [f'{{"question_id": 0, "model_id": "{m}", "choices": [{{"turns": ["x"]}}]}}\n' for m in "mn"]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="holds the answers of 2 models"):
        read_answers(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"a\.jsonl: holds no answers"):
        read_answers(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(lines[0])
    assert read_answers(tmp_path / "a.jsonl").all_cut is None, "the file does not say it"


@pytest.mark.parametrize(("name", "language", "start", "each"), [("mt-en", "en", 1001, 5), ("mt-tr", "tr", 2001, 10)])
def test_shipped_questions_are_as_many_in_eight_categories(name, language, start, each):
    questions, records = load_prompts(name), [record for _, record in json_lines(prompt_file(name))]
    assert [question.id for question in questions] == list(range(start, start + 8 * each))
    assert sorted(Counter(record["category"] for record in records).items()) == [
        (category, each) for category in ("coding", "extraction", "humanities", "math", "reasoning", "roleplay", "stem",
                                       "writing")]
    for question, record in zip(questions, records, strict=True):
        assert len(question.turns) == 2
        references = record.get("reference", [])
        assert len(references) in ((2,) if record["category"] in ("math", "reasoning", "coding") else (0, 2)), (
            "a judge of FastChat's needs these, turn by turn")
        assert all(isinstance(reference, str) for reference in references)
        assert language in detect(" ".join(question.turns)), question.turns
    assert len({turn for question in questions for turn in question.turns}) == 16 * each


@pytest.mark.parametrize(("record", "message"), [
    ({"turns": ["a"]}, "question_id .or key. must be a number or text, not None"),
    ({"question_id": 1, "turns": "a"}, "must be text in a list"),
    ({"question_id": 1}, "must be text in a list"),
    ({"question_id": 0, "turns": ["a"]}, "question 0 is in this file already; give it another id"),
])
def test_broken_questions_are_named_with_their_line(tmp_path, record, message):
    (tmp_path / "q.jsonl").write_text('{"key": 0, "prompt": "a"}\n' + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=rf"q.jsonl:2: .*{message}"):
        load_prompts(tmp_path / "q.jsonl")


def test_a_model_is_called_after_its_run():
    assert model_name("runs/my/final") == "my/final"
    assert model_name("models/Llama-3/") == "Llama-3"


def test_command_answers_and_then_only_counts(tmp_path, capsys):
    folder = write_tiny_llama(tmp_path / "tiny")
    (tmp_path / "q.jsonl").write_text('{"question_id": 7, "turns": ["Hi", "And then?"]}\n'
                                     '{"key": 8, "prompt": "Hello"}\n')
    command = ["answer", str(folder), "--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "a.jsonl"),
               "--max-new-tokens", "5", "--template", "llama3", "--json", str(tmp_path / "r.json")]
    assert main([*command, "--flips"]) == 0
    assert "tiny, 2 questions\n3 answers" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (report["signals"]["answers"], report["flips"]["questions"]) == (3, 16)
    (folder / "model.safetensors").unlink()  # nothing is left to answer, so no weights are read
    assert main(command) == 0
    assert len((tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(("options", "message"), [
    (["--questions", "nothing.jsonl"], "nothing.jsonl: no such file"),
    (["--questions", "mt-en", "--colour"], "unknown argument --colour; `minisft answer --help` lists the options"),
    (["--questions", "mt-en"], "nowhere: no such folder; name a Hugging Face folder, such as runs/my/final"),
    (["--questions", "mt-en", "--json", "a.jsonl"], "--json a.jsonl: named twice, and one output would "
                                                    "overwrite the other; name another file"),
    (["--questions", "./a.jsonl"], "--out a.jsonl: this command reads that file and would overwrite it; "
                                   "name another file"),
    (["--questions", "mt-en", "--json", "."], "--json .: is a folder; name a file"),
])
def test_bad_arguments_end_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["answer", "nowhere", "--out", "a.jsonl", *options]) == 2
    assert capsys.readouterr().err.strip() == f"error: {message}"
    assert not (tmp_path / "a.jsonl").exists()


def test_a_question_past_the_context_is_named(tmp_path, capsys, base):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "turns": ["Hi", "so long " * 200]}))
    command = ["answer", str(base), "--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "a.jsonl")]
    assert main([*command, "--template", "llama3", "--max-new-tokens", "9"]) == 2
    error = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]
    assert "error: 'so long so long " in error
    assert error.endswith("tokens with all turns before it, but the model's context has 1,024; shorten the "
                          "question, or the answers before it with --max-new-tokens")
