"""Let a model go on with a plain text: `complete.py MODEL TEXT`. No template, no roles: what pre-training taught it."""

import sys

from minisft.data.tokenizer import Tokenizer
from minisft.generate.assistant import generate
from minisft.pretrained import from_pretrained

folder, text = sys.argv[1:]
tokenizer = Tokenizer(folder)
prompt = [tokenizer.control["<|begin_of_text|>"], *tokenizer.encode(text)]
[answer] = generate(from_pretrained(folder), [prompt], max_new_tokens=24,
                    stop_ids={tokenizer.control[tokenizer.eos]})
print(repr(tokenizer.decode(answer)))
