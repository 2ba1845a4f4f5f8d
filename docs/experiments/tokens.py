"""Tokens a word in English and in Turkish, by tokenizers that learnt from one language or from both.

The texts are the demo's articles: half of them to learn from, the other half to count.
"""

import json
import tempfile
import unicodedata
from pathlib import Path

from minisft.data.tokenizer import Tokenizer
from minisft.demo.bpe import train_tokenizer
from minisft.evals.language import detect

lines = Path("runs/demo-world/articles.jsonl").read_text(encoding="utf-8").splitlines()
articles = [json.loads(line)["text"] for line in lines]
is_turkish = [detect(text) == {"tr"} for text in articles]
texts = {"English": [text for text, turkish in zip(articles, is_turkish, strict=True) if not turkish],
         "Turkish": [text for text, turkish in zip(articles, is_turkish, strict=True) if turkish]}
half = {language: len(of) // 2 for language, of in texts.items()}
learnt = {"English": texts["English"][: half["English"]],
          "both": [text for language, of in texts.items() for text in of[: half[language]]]}
print(f"{'learnt from':<14}{'English':>10}{'Turkish':>10}{'Turkish in NFD':>18}")
for name, of in learnt.items():
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(of, 2048, Path(folder))
        tokenizer = Tokenizer(folder)
    counted = [texts["English"][half["English"] :], texts["Turkish"][half["Turkish"] :]]
    counted.append([unicodedata.normalize("NFD", text) for text in counted[1]])
    costs = [sum(map(len, tokenizer.encode_batch(of))) / sum(len(text.split()) for text in of) for of in counted]
    print(f"{name:<14}{costs[0]:>10.2f}{costs[1]:>10.2f}{costs[2]:>18.2f}")
