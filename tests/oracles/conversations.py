"""The 32 conversations of the oracle runs, put together from hand-written exchanges.

Every second one is Turkish; every fourth has a system turn; they hold one to four exchanges, so that the lengths differ
by a factor of ten and a mean of means would not pass for a mean. Some turns begin or end with white space, which
Llama-3's Hugging Face template trims; others hold blank lines, code, digits and emoji, which it must leave alone.

    python tests/oracles/conversations.py      # writes conversations.jsonl beside this file
"""

import json
from pathlib import Path

CONVERSATIONS = Path(__file__).with_name("conversations.jsonl")

SYSTEM = {
    "en": ["You are a terse assistant.", "Answer like a patient teacher.\n\nGive one example.", "  Be kind.  "],
    "tr": ["Kısa ve açık yanıt ver.", "Sabırlı bir öğretmensin.\n\nBir örnek ver.", "  Nazik ol.  "],
}
EXCHANGES = {
    "en": [
        ("Why is the sky blue?", "Air scatters short waves more than long ones, so blue light comes from all sides."),
        ("And at sunset?", "The path is longer; the blue is gone and the red is left."),
        ("Add 127 and 4096.", "127 + 4096 = 4223."),
        ("Twice that?", "8446"),
        ("List three fruits.", "- apple\n- pear\n- plum"),
        ("  Write a line of Python that reverses s.\n", "s[::-1]"),
        ("In a function, please.", "def reverse(s):\n    return s[::-1]\n\n\nprint(reverse('abc'))"),
        ("Translate 'good morning' to Turkish.", "Günaydın."),
        ("How do I boil an egg?", "1. Boil water.\n2. Put the egg in for 7 minutes.\n3. Cool it under the tap.\n"),
        ("Is 91 a prime?", "No: 91 = 7 * 13."),
        ("Thanks!", " You're welcome 🙂 "),
    ],
    "tr": [
        ("Türkiye'nin başkenti neresi?", "Ankara."),
        ("Peki en kalabalık şehri?", "İstanbul; nüfusu on beş milyonun üzerindedir."),
        ("Faiz nedir?", "Ödünç alınan paranın kullanım bedelidir.\n\nÖrnek: 1.000 liraya yılda %20 faiz 200 liradır."),
        ("Bileşik olursa?\n", "İki yılda 1.000 lira 1.440 lira olur, çünkü faiz de faiz kazanır."),
        ("Üç renk say.", "kırmızı, yeşil, mavi"),
        ("'Kitap' kelimesinin çoğulu?", "kitaplar"),
        ("Çayı nasıl demlersin?", "Önce suyu kaynatır, çayı ekler, kısık ateşte 15 dakika beklerim. Sonra süzerim."),
        ("Neden kısık ateş?", "  Yaprak yanmasın, tadı acılaşmasın diye."),
        ("Bugün hava nasıl?", "Bunu bilemem; pencereden bakmanı öneririm."),
        ("12 çarpı 12?", "144"),
        ("Teşekkürler", "Rica ederim ☕\n"),
    ],
}


def conversations() -> list[dict]:
    """32 objects {"messages": [{"role", "content"}, ...]} in OpenAI's format, always the same."""
    return [{"messages": conversation(index)} for index in range(32)]


def conversation(index: int) -> list[dict]:
    language, number = "tr" if index % 2 else "en", index // 2
    systems, exchanges = SYSTEM[language], EXCHANGES[language]
    messages = []
    if number % 4 == 2:
        messages.append({"role": "system", "content": systems[number // 4 % len(systems)]})
    for turn in range(1 + number * 5 % 4):
        question, answer = exchanges[(number * 3 + turn) % len(exchanges)]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


if __name__ == "__main__":
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in conversations()]
    CONVERSATIONS.write_text("".join(lines), encoding="utf-8")
