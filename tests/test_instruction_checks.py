"""Verdicts on instructions are those of lm_eval's IFEval program; Turkish and the rest have examples here."""

import os
import random
import unicodedata

import pytest

from minisft.errors import UserError
from minisft.evals.instructions import CHECKS, InstructionPrompt, figures, load, parameters, sentences, strictly
from minisft.evals.language import detect, languages, lost_dots, lower
from minisft.generate.assistant import Assistant

SENTENCES = ("The cat sat on the mat.", "Why not?", "It was cold!", "We saw Rome, Paris and Bonn.", "I have a plan.",
             "She asked me to wait for Dr. Smith.", "A good idea costs 3.5 euros.", "NASA and the UN AGREE.")
PIECES = ("* one point", "- another point", "** bold **", "*marked*", "**strong**", "[name]", "[date of birth]",
          "<<A title>>", "<< >>", "P.S. Write soon.", "P. S. Again.", "p.p.s. More", "Section 1", "Section2 and more",
          "******", "***", "# Heading", '"quoted"', "{\"a\": 1}", "My answer is yes.", "Any other questions?", "",
          "pears and PEARS", "a pearl", "Take care", "C++ or c++")
GIVEN = {  # the parameters of each instruction, as a draw
    "keywords:existence": lambda r: {"keywords": r.sample(["cat", "pear", "plan", "rome"], 2)},
    "keywords:frequency": lambda r: {"keyword": r.choice(["a", "pear", "the"]), "frequency": r.randint(1, 5),
                                     "relation": r.choice(["less than", "at least"])},
    "keywords:forbidden_words": lambda r: {"forbidden_words": r.sample(["cat", "pear", "pears", "nasa"], 2)},
    "keywords:letter_frequency": lambda r: {"letter": r.choice("aeiQ"), "let_frequency": r.randint(1, 20),
                                            "let_relation": r.choice(["less than", "at least"])},
    "length_constraints:number_sentences": lambda r: {"num_sentences": r.randint(1, 6),
                                                      "relation": r.choice(["less than", "at least"])},
    "length_constraints:number_paragraphs": lambda r: {"num_paragraphs": r.randint(1, 4)},
    "length_constraints:number_words": lambda r: {"num_words": r.randint(5, 40),
                                                  "relation": r.choice(["less than", "at least"])},
    "length_constraints:nth_paragraph_first_word": lambda r: {"num_paragraphs": r.randint(1, 3), "nth_paragraph": 1,
                                                              "first_word": r.choice(["the", "Why", "it"])},
    "detectable_content:number_placeholders": lambda r: {"num_placeholders": r.randint(1, 3)},
    "detectable_content:postscript": lambda r: {"postscript_marker": r.choice(["P.S.", "P.P.S"])},
    "detectable_format:number_bullet_lists": lambda r: {"num_bullets": r.randint(1, 3)},
    "detectable_format:constrained_response": lambda r: {},
    "detectable_format:number_highlighted_sections": lambda r: {"num_highlights": r.randint(1, 4)},
    "detectable_format:multiple_sections": lambda r: {"section_spliter": "Section", "num_sections": r.randint(1, 2)},
    "detectable_format:json_format": lambda r: {},
    "detectable_format:title": lambda r: {},
    "combination:two_responses": lambda r: {},
    "combination:repeat_prompt": lambda r: {"prompt_to_repeat": r.choice(["The cat sat", "why NOT?"])},
    "startend:end_checker": lambda r: {"end_phrase": r.choice(["any other questions?", "Agree.", "mat."])},
    "startend:quotation": lambda r: {},
    "change_case:capital_word_frequency": lambda r: {"capital_frequency": r.randint(1, 4),
                                                     "capital_relation": r.choice(["less than", "at least"])},
    "change_case:english_capital": lambda r: {},
    "change_case:english_lowercase": lambda r: {},
    "punctuation:no_comma": lambda r: {},
}


def drawn(r):
    """An answer: sentences and pieces, joined in ways that one or another instruction looks at."""
    if r.random() < 0.1:
        return r.choice(['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "{'a': 1}", "```\n[1]\n```", "My answer is no."])
    parts = [" ".join(r.choices(SENTENCES, k=r.randint(1, 3))) if r.random() < 0.6 else r.choice(PIECES)
             for _ in range(r.randint(1, 5))]
    text = r.choice(["\n", "\n\n", "\n***\n", "\n******\n"]).join(parts)
    return r.choice([str, str, str.upper, str.lower, lambda text: f'"{text}"', lambda text: text + " "])(text)


@pytest.fixture(scope="module")
def oracle():
    """(instruction, answer, parameters) -> IFEval's verdict, as lm_eval computes it."""
    pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    treebank = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nltk.download", lambda *_, **__: True)  # it would fetch punkt when it is imported
        patch.setattr("nltk.data.find", lambda *_, **__: True)
        registry = pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry")
    from lm_eval.tasks.ifeval import instructions, instructions_util

    # Its sentences need a model of punkt, which no package carries; its own splitter by rules takes their place.
    instructions_util.count_sentences = lambda text: len(instructions_util.split_into_sentences(text))
    instructions_util.nltk.word_tokenize = treebank.tokenize
    detect_any = instructions.langdetect.detect
    instructions.langdetect.detect = lambda text: detect_any(text.lower())  # capitals look German to it

    def verdict(instruction, answer, given):
        checker = registry.INSTRUCTION_DICT[instruction](instruction)
        checker.build_description(**given)
        return bool(checker.check_following(answer))

    return verdict


@pytest.mark.parametrize("instruction", sorted(GIVEN))
def test_verdicts_are_those_of_ifeval(instruction, oracle):
    r, verdicts = random.Random(instruction), []
    for _ in range(150):
        answer, given = drawn(r), GIVEN[instruction](r)
        if instruction.startswith("change_case:english"):  # its language is a guess on short text
            answer = r.choice([str.upper, str.lower, str])("The answer is that we have to wait for the others to come.")
        if instruction.endswith("number_sentences"):  # what a heading or a bullet is, the two see differently
            answer = r.choice([" ", "\n", "\n\n"]).join(r.choices(SENTENCES, k=r.randint(1, 6)))
        verdicts.append(CHECKS[instruction](answer, "en", **given))
        assert verdicts[-1] == oracle(instruction, answer, given), (answer, given)
    assert True in verdicts, "no answer followed: the test says nothing"
    assert False in verdicts, "every answer followed: the test says nothing"


def test_every_instruction_of_ifeval_has_a_check(oracle):
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    ours = {"startend:start_checker", "change_case:turkish_capital", "change_case:turkish_lowercase"}
    assert set(CHECKS) - ours == set(INSTRUCTION_DICT)
    assert set(GIVEN) | {"language:response_language"} == set(INSTRUCTION_DICT)


SPOKEN = {
    "en": "The weather was so bad that we had to stay at home with the children.",
    "tr": "Hava çok kötü olduğu için çocuklarla birlikte evde kalmak zorunda kaldık ve hiç dışarı çıkmadık.",
    "de": "Das Wetter war so schlecht, dass wir mit den Kindern zu Hause bleiben mussten.",
    "fr": "Le temps était si mauvais que nous avons dû rester à la maison avec les enfants.",
    "es": "El tiempo era tan malo que tuvimos que quedarnos en casa con los niños.",
    "it": "Il tempo era così brutto che siamo dovuti restare a casa con i bambini e non siamo usciti.",
    "pt": "O tempo estava tão ruim que não pudemos sair de casa com as crianças.",
    "pl": "Pogoda była tak zła, że musieliśmy zostać w domu z dziećmi.",
    "fi": "Sää oli niin huono, että meidän oli pakko jäädä kotiin lasten kanssa.",
    "nl": "Het weer was zo slecht dat we met de kinderen thuis moesten blijven.",
    "vi": "Thời tiết xấu đến mức chúng tôi phải ở nhà với các con.",
    "ru": "Погода была такая плохая, что мы не могли выйти из дома.",
    "uk": "Погода була така погана, що ми не могли вийти з дому і залишилися з дітьми.",
    "bg": "Времето беше толкова лошо, че трябваше да останем вкъщи с децата.",
    "ar": "كان الطقس سيئا إلى حد أننا بقينا في البيت مع الأطفال.",
    "fa": "هوا آنقدر بد بود که ما با بچه‌ها در خانه ماندیم و این را نمی‌خواستیم.",
    "ur": "موسم اتنا خراب تھا کہ ہم کو بچوں کے ساتھ گھر میں رہنا پڑا۔",
    "hi": "मौसम इतना खराब था कि हमें बच्चों के साथ घर में रहना पड़ा।",
    "ne": "मौसम यति खराब थियो कि हामी घरमा बस्यौं र यो राम्रो हो।",
    "mr": "हवामान खूप वाईट होते आणि आम्ही मुलांसोबत घरी राहिलो.",
    "ja": "天気がとても悪かったので、子供たちと家にいました。",
    "ko": "날씨가 너무 나빠서 아이들과 집에 있었습니다.",
    "th": "อากาศแย่มากจนเราต้องอยู่บ้านกับลูก",
    "kn": "ಹವಾಮಾನ ತುಂಬಾ ಕೆಟ್ಟದಾಗಿತ್ತು.",
}


@pytest.mark.parametrize(("language", "text"), [
    ("it", "Perché la città è più bella? C'è un caffè laggiù."), ("it", "È un caffè."),
    ("pt", "Você vê três bebês."), ("fr", "Où est la fenêtre du salon ?")])
def test_an_accent_that_languages_share_decides_for_none(language, text):
    assert detect(text) == {language}


ALPHABETS = {  # of the languages in Latin and Cyrillic letters, without those of loanwords, with Turkish â, î, û
    "en": "", "tr": "çğıİöşüâîû", "de": "äöüß", "fr": "àâæçéèêëîïôœùûüÿ", "es": "áéíñóúü", "it": "àèéìòù",
    "pt": "áâãàçéêíóôõú", "nl": "áäéëíïóöúü", "sv": "åäöéà", "pl": "ąćęłńóśźż", "fi": "äö", "sw": "", "id": "",
    "vi": "àảãáạăằẳẵắặâầẩẫấậđèẻẽéẹêềểễếệìỉĩíịòỏõóọôồổỗốộơờởỡớợùủũúụưừửữứựỳỷỹýỵ",
    "ru": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя", "uk": "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя",
    "bg": "абвгдежзийклмнопрстуфхцчшщъьюяѝ"}


@pytest.mark.parametrize("script", ["LATIN", "CYRILLIC"])
def test_own_letters_are_those_that_no_other_language_has(script):
    """Rare ones apart (æ, ÿ); for Italian and Portuguese Vietnamese does not count, which has most accents."""
    for code, (_, letters) in languages()[script].items():
        others = {letter for other in languages()[script] if other != code
                  and (code, other) not in (("it", "vi"), ("pt", "vi")) for letter in ALPHABETS[other]}
        assert letters - set("¿¡") == set(ALPHABETS[code]) - others - set("æÿ"), code


@pytest.mark.parametrize(("language", "text"), [
    ("tr", "Şoför işçileri taşımış."), ("tr", "Beş kardeş konuştu."), ("tr", "ŞEKER PAŞA"), ("pl", "Ćma lubi noć."),
    ("vi", "Mỹ ý kiến"), ("vi", "chăn trâu"), ("bg", "Майка ѝ"), ("hi", "बड़ा लड़का पढ़ता")])
def test_a_letter_of_its_own_tells_a_language_in_any_unicode_form(language, text):
    for form in ("NFC", "NFD", "NFKC"):
        assert detect(unicodedata.normalize(form, text)) == {language}


@pytest.mark.parametrize("language", sorted(SPOKEN))
def test_a_sentence_is_in_its_language_and_langdetect_agrees(language):
    assert detect(SPOKEN[language]) == {language}
    langdetect = pytest.importorskip("langdetect")
    langdetect.DetectorFactory.seed = 0
    assert langdetect.detect(SPOKEN[language]) == language


def test_doubt_about_a_language_is_said():
    assert detect("Ankara") >= {"en", "tr", "de"}
    assert detect("Mali 42 Delhi").isdisjoint({"ru", "ar"})
    assert detect("42!") == set()
    assert detect(SPOKEN["tr"].replace("i", "İ").upper()) == {"tr"}
    assert detect(SPOKEN["en"].upper()) == {"en"}, "I in capitals is no ı"
    assert sum(map(len, languages().values())) == 36


def test_turkish_letters_keep_their_dots():
    pairs = [("KIRMIZI ŞİŞE", "kırmızı şişe"), ("İZMİR IŞIĞI", "izmir ışığı"), ("ÇÖĞÜŞ", "çöğüş")]
    for capital, small in pairs:
        assert lower(capital, "tr") == small
        assert lower(unicodedata.normalize("NFD", capital), "tr") == small
    assert lower("I SAW", "en") == "i saw"


@pytest.mark.parametrize(("instruction", "answer", "given", "turkish", "english"), [
    ("keywords:existence", "İSTANBUL BÜYÜK", {"keywords": ["istanbul"]}, True, False),
    ("keywords:existence", "ILIK BİR GÜN", {"keywords": ["ılık"]}, True, False),
    ("keywords:frequency", "Isı arttı, ISI azaldı, ısı", {"keyword": "ısı", "frequency": 3, "relation": "exactly"},
     True, False),
    ("keywords:forbidden_words", "IŞIK söndü", {"forbidden_words": ["ışık"]}, False, True),
    ("keywords:forbidden_words", "ışıklar söndü", {"forbidden_words": ["ışık"]}, False, True),  # as existence counts
    ("keywords:forbidden_words", "kısırı ısırdı", {"forbidden_words": ["ısı"]}, True, True),
    ("keywords:letter_frequency", "İyi IŞIK", {"letter": "i", "let_frequency": 2, "let_relation": "exactly"},
     True, False),
    ("startend:end_checker", "Hoşça kal. İYİ GECELER.", {"end_phrase": "iyi geceler."}, True, False),
    ("startend:start_checker", "  ISPARTA'da güller açtı", {"start_phrase": "Isparta"}, True, True),
    ("length_constraints:nth_paragraph_first_word", "Yaz.\n\nİlkbahar geldi.",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "ilkbahar"}, True, False),
    ("detectable_format:constrained_response", "Cevabım hayır.", {}, True, False),
    ("detectable_content:postscript", "Görüşürüz\nNOT: Kediyi besle", {"postscript_marker": "Not:"}, True, True),
])
def test_letters_follow_the_case_of_the_questions_language(instruction, answer, given, turkish, english):
    assert CHECKS[instruction](answer, "tr", **given) is turkish
    assert CHECKS[instruction](answer, "en", **given) is english


def test_turkish_in_one_case():
    capital, small = CHECKS["change_case:turkish_capital"], CHECKS["change_case:turkish_lowercase"]
    assert capital("ASANSÖR BUGÜN İÇİN ÇALIŞMIYOR.", "tr")
    assert not capital("Asansör bugün çalışmıyor.", "tr")
    assert not capital("THE LIFT IS OUT OF ORDER AND WILL BE REPAIRED.", "tr")
    assert small("iyi ki doğdun, bu yıl da çok mutlu ol.", "tr")
    assert not small("İyi ki doğdun".lower() + " ve çok mutlu ol", "tr"), "i with a combining dot is no Turkish letter"


@pytest.mark.parametrize(("text", "lost"), [
    ("BU SENIN IÇIN GÜZEL OLACAK", True), ("BIR GÜN OKULA GELECEK VE ÇOK ÇALIŞACAK", True), ("BU DEĞIL", True),
    ("ÖĞRENCI OKULA GELDI", True), ("NEVŞEHIR VE ESKIŞEHIR", True), ("EĞITIM ÇOK ÖNEMLI", True), ("GELIŞIM", True),
    ("BU, İÇIN İÇIN YANDI", True), ("DEĞIŞIKLIK OLDU", True), ("bu da bır şey", True), ("O GÜN GIBI", True),
    ("BU SENİN İÇİN GÜZEL OLACAK", False), ("YÜZYIL ÖNCE, BİNYIL SONRA", False), ("KIŞI SEVER VE IŞIĞI AÇAR", False),
    ("YANI SIRA SINIR VE AÇI", False), ("YEŞİLIRMAK VE DİYARBAKIR", False), ("BU LINKEDIN VE WIFI İÇİN", False),
    ("INTERNET VE EMAIL ÇOK YAVAŞ", False), ("KIM JONG UN VE MICHAEL ÇOK SEVİNDİ", False),
    ("MI MÜZİK NOTASIDIR", False), ("GÜNIŞIĞI ÇOK GÜZEL", False),
    ("GÖTTINGEN VE ZÜRICH DE GÜZEL", False), ("DİKKATİ VE İNKÂRI", False),
])
def test_turkish_capitals_that_lost_their_dots_are_not_turkish(text, lost):
    check = CHECKS["change_case:turkish_capital" if text.isupper() else "change_case:turkish_lowercase"]
    for form in ("NFC", "NFD"):
        assert lost_dots(unicodedata.normalize(form, text)) is lost
    assert check(f"{text} VE ÇOK GÜZEL" if text.isupper() else f"{text} ve çok güzel", "tr") is not lost


@pytest.mark.parametrize(("keyword", "text", "count"), [
    ("ısı", "Isı, ISI, ısıyı, ısının, ısıda, ısıdan, ısıya, ısıyla, ısılar, ısısı, ısıdır", 11),
    ("ısı", "ISI'yı ısı’dan", 2), ("Isparta", "Isparta'nın gülü ISPARTA’da", 2),
    ("ısı", "Köpek ısırdı, kısırı yedi, ısıttı, ısındı; yanısıra kısı", 0), ("el", "elma elbise elli", 0),
    ("balon", "Balonlar, balonlarımızdan, balondakiler, balonun, balona, balonla", 6), ("balon", "Balonsu balonlu", 0),
    ("ev", "evde evler evimizden evdir evin", 5), ("ev", "evet evlat evren sevgi ödev", 0),
    ("kar", "kart Karga akar kartal", 0), ("göz yaşı", "Göz yaşı, göz yaşının", 2), ("c++", "C++ ve c++'ta", 2),
])
def test_a_turkish_keyword_is_a_word_with_or_without_endings(keyword, text, count):
    given = {"keyword": keyword, "frequency": count, "relation": "exactly"}
    for form in ("NFC", "NFD"):
        [followed] = strictly(unicodedata.normalize(form, text), InstructionPrompt(1, "?", "tr", ((
            "keywords:frequency", parameters("keywords:frequency", given, "f:1")),)))
        assert followed
    assert CHECKS["keywords:existence"](text, "tr", keywords=[keyword]) is (count > 0)


def test_english_keywords_count_inside_words_as_ifevals_do():
    assert CHECKS["keywords:frequency"]("check unchecked", "en", keyword="check", frequency=2, relation="exactly")
    assert CHECKS["keywords:letter_frequency"]("ısırdı", "tr", letter="ı", let_frequency=3, let_relation="exactly")


def test_instructions_are_checked_in_composed_unicode():
    """A letter and its mark in two characters would end a word between them."""
    text = unicodedata.normalize("NFD", "Bölüm 1: GÜZEL İZMİR\nBölüm 2: şeker")
    for name, given in (("length_constraints:number_words", {"num_words": 7, "relation": "exactly"}),
                        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "exactly"}),
                        ("detectable_format:multiple_sections", {"section_spliter": "Bölüm", "num_sections": 2}),
                        ("keywords:forbidden_words", {"forbidden_words": ["gu", "seker"]})):
        for form in ("NFC", "NFD"):
            there = {key: unicodedata.normalize(form, value) if key == "section_spliter" else value
                     for key, value in given.items()}
            asked = InstructionPrompt(1, "?", "tr", ((name, parameters(name, there, "f:1")),))
            assert strictly(text, asked) == [True], name


def test_keywords_are_text_and_letters_any_character():
    assert CHECKS["keywords:existence"]("I like C++ and (a.b)", "en", keywords=["c++", "(a.b)"])
    assert not CHECKS["keywords:existence"]("axb", "en", keywords=["a.b"])
    assert not CHECKS["keywords:forbidden_words"]("use c++ now", "en", forbidden_words=["C++"])
    assert CHECKS["keywords:letter_frequency"]("#a #b", "en", letter="#", let_frequency=2, let_relation="at least")


@pytest.mark.parametrize(("text", "count"), [
    ("", 0), ("One", 1), ("One. Two! Three? Four", 4), ("Wait... what?! Yes.", 2),
    ("He said: \"Stop.\" Then he left.", 2),
    ("Dr. Ayşe geldi. 3. sınıf öğrencileri sevindi.", 2), ("J. R. Smith came, e.g. today. He left", 2),
    ("Bkz. Ek 2. Örn. Ankara.", 2), ("It costs 3.5 euros. Visit a.com now.", 2), ("Line one.\nLine two.\n", 2),
    ("...", 0), ("Hava soğuk… Kar var mı?", 2),
])
def test_sentences(text, count):
    assert sentences(text) == count


@pytest.mark.parametrize(("text", "count"), [
    ("O, 3. sırada oturuyor. Ben 4. sıradayım.", 2), ("19. yüzyıl zordu. Sonra düzeldi.", 2),
    ("Padişah IV. Murat öldü. Yerine İbrahim geçti.", 2), ("II. Dünya Savaşı bitti. XIV. Louis öldü.", 2),
    ("Sultan 3. Selim yenilikçiydi. Tahttan indirildi.", 2), ("Onu Dr. Ayşe ile Doç. Dr. Ali gördü. İyiydi.", 2),
    ("Elma, armut vb. Anadolu meyveleri tatlıdır.", 1), ("Örn. Ankara bir şehirdir. Bkz. s. 12.", 2),
    ("Hz. Mevlana'yı anlattı. Av. Can dinledi.", 2), ("T.C. Ziraat Bankası A.Ş. Genel Müdürü geldi.", 1),
    ("1. Elma al.\n2. Süt al.\n3. Eve dön.", 3), ("Önce kes. 2. Sonra karıştır.", 2),
    ("Elma, armut vb. Bunlar meyvedir.", 2), ("5 + 6 = 11. Cevap budur.", 2), ("Yıl 1923. Ankara başkent oldu.", 2),
    ("Doğru cevap C. Bu kesin.", 2), ("Puanı 25. Sonra yükseldi.", 2), ("Geldi. Gördü. Yendi.", 3),
    ("Kaçıncı? 3. Murat mı! Evet.", 3), ("Bölüm IV. Bu bölüm kısa.", 2),
])
def test_turkish_ordinals_and_abbreviations_end_no_sentence(text, count):
    assert sentences(text, "tr") == count
    assert CHECKS["length_constraints:number_sentences"](text, "tr", num_sentences=count, relation="exactly")


@pytest.mark.parametrize(("text", "count"), [
    ("I have 3. You have 4.", 2), ("After World War II. Paris was free.", 2), ("J.R.R. Tolkien wrote it. It sold.", 2),
    ("The answer is B. It is right.", 2), ("He lives in the U.S. He likes it.", 2), ("See p. 12. It is there.", 2),
    ("She said no. He left.", 2), ("1. Boil water.\n2. Add tea.", 2), ("Pears, plums, etc. They are sweet.", 2),
    ("See the U.S. Senate.", 1),
])
def test_english_sentences_end_after_numbers_and_before_function_words(text, count):
    assert sentences(text) == sentences(text, "en") == count


@pytest.mark.parametrize(("instruction", "given", "message"), [
    ("keywords:existence", {}, "f:3: keywords:existence takes keywords; found none"),
    ("punctuation:no_comma", {"x": 1}, "f:3: punctuation:no_comma takes no parameters; found x"),
    ("keywords:existence", {"keywords": "cat"}, "f:3: keywords:existence: keywords must be a list of texts, not 'cat'"),
    ("keywords:existence", {"keywords": [""]}, "must be a list of texts"),
    ("length_constraints:number_words", {"relation": "about", "num_words": 3},
     "relation must be one of less than, at least, exactly, not 'about'"),
    ("length_constraints:number_words", {"relation": "at least", "num_words": True}, "be a whole number, not True"),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 2.5}, "be a whole number, not 2.5"),
    ("startend:end_checker", {"end_phrase": " "}, "end_phrase must be text"),
    ("language:response_language", {"language": "xx"}, "cannot detect the language 'xx'; choose from ar, bg,"),
])
def test_wrong_parameters_are_named(instruction, given, message):
    with pytest.raises(UserError) as error:
        parameters(instruction, given, "f:3")
    assert message in str(error.value)


def test_null_parameters_are_as_good_as_none():
    given = {"num_words": 3.0, "relation": "at least", "keywords": None, "language": None}
    assert parameters("length_constraints:number_words", given, "f:1") == {"num_words": 3, "relation": "at least"}


@pytest.mark.slow
@pytest.mark.skipif("MINISFT_SMOLLM2" not in os.environ, reason="MINISFT_SMOLLM2 names no model")
def test_answers_of_a_model_are_judged_as_ifeval_judges_them(oracle):
    """The shipped prompts, as far as IFEval knows their instructions: without Turkish ones and without "exactly"."""
    from lm_eval.tasks.ifeval import utils
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    asked = load("instructions")
    found = figures(Assistant.load(os.environ["MINISFT_SMOLLM2"]), asked, max_new_tokens=128)["answers"]
    judged = 0
    for prompt, said in zip(asked.prompts, found, strict=True):
        for (name, given), *verdicts in zip(prompt.instructions, said["strict"], said["loose"], strict=True):
            if name in INSTRUCTION_DICT and given.get("relation") != "exactly" and given.get("language") != "tr":
                document = {"key": 1, "prompt": prompt.prompt, "instruction_id_list": [name], "kwargs": [given]}
                wanted = utils.process_results(document, [said["answer"]])
                assert verdicts == [wanted[f"inst_level_{kind}_acc"][0] for kind in ("strict", "loose")], (name, said)
                judged += 1
    assert judged == 34
