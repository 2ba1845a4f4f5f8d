"""Which tokens of ten conversations are trained: `from_trl.py [--trl] [--model FOLDER]`.

The first conversation with its trained tokens in ⟦ ⟧, and sums over all ten; by minisft, and with --trl (`pip install
trl`; written for 1.16) also by a script that gives TRL a column of texts, by one whose collator masks what it takes for
padding, and by TRL with `messages` and `assistant_only_loss=True`. Labels are made, and nothing is trained.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from minisft.config_io import load
from minisft.data.tokenizer import Tokenizer
from minisft.prepare import prepare

FILE, BOS, STOP = "docs/experiments/ten_conversations.jsonl", "<|begin_of_text|>", "<|eot_id|>"


class Row(NamedTuple):
    """A conversation's token ids, and for each if it is trained."""

    ids: list[int]
    trained: list[bool]


def of_minisft(model: str) -> list[Row]:
    """The rows of docs/experiments/from_trl.toml."""
    dataset = prepare(load(["docs/experiments/from_trl.toml", "--model.path", model]), quiet=True).train
    return [Row(ids.tolist(), (weights > 0).tolist()) for ids, weights in map(dataset.document, range(len(dataset)))]


def of_trl(model: str) -> dict[str, list[Row]]:
    """The rows of three scripts. The network is tiny and random, because labels do not depend on it."""
    import datasets
    import trl
    from tokenizers.processors import TemplateProcessing
    from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json", bos_token=BOS, eos_token=STOP)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # as Llama-3's has it; the demo's has none
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/llama3.jinja").read_text(encoding="utf-8")
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
                                           num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
    chats = [json.loads(line) for line in Path(FILE).read_text(encoding="utf-8").splitlines()]
    texts = [{"text": tokenizer.apply_chat_template(chat["messages"], tokenize=False)} for chat in chats]

    def rows(batch: dict, lengths: Iterable[int]) -> Iterable[Row]:
        """The rows of a batch of one, in which they lie one after another. A model shifts labels by itself, so no
        position predicts a row's first token."""
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        for length in lengths:
            yield Row(ids[:length], [False, *(label != -100 for label in labels[1:length])])
            ids, labels = ids[length:], labels[length:]

    def of_trainer(records: list[dict], **settings) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            config = trl.SFTConfig(folder, max_length=2048, packing=True, use_cpu=True, report_to=[], **settings)
            trainer = trl.SFTTrainer(model=network, args=config, processing_class=tokenizer,
                                     train_dataset=datasets.Dataset.from_list(records))
            return [row for pack in trainer.train_dataset
                    for row in rows(trainer.data_collator([pack]), pack["seq_lengths"])]

    masking, encoded = DataCollatorForLanguageModeling(tokenizer, mlm=False), [tokenizer(one["text"]) for one in texts]
    return {"texts": of_trainer(texts, dataset_text_field="text"),
            "texts, pad masked": [row for one in encoded for row in rows(masking([one]), [len(one["input_ids"])])],
            "messages": of_trainer(chats, assistant_only_loss=True)}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--trl", action="store_true", help="also what TRL trains")
parser.add_argument("--model", default="runs/demo-base/final", help="a Llama-3 folder, for its tokenizer")
options = parser.parse_args()
if options.trl and not find_spec("trl"):
    sys.exit("TRL is not installed: pip install trl. Without --trl this prints what minisft trains")

tokenizer, right, sums = Tokenizer(options.model), of_minisft(options.model), []
bos, stop = tokenizer.control[BOS], tokenizer.control[STOP]
for name, rows in {**(of_trl(options.model) if options.trl else {}), "minisft": right}.items():
    tokens, trained, outside, stops, begun_twice = 0, 0, 0, 0, 0
    for ours in right:
        # TRL packs in another order: a conversation is found by its ids, before which a second BOS may stand.
        row = next(row for row in rows if row.ids[-len(ours.ids):] == ours.ids)
        wanted = [False] * (len(row.ids) - len(ours.ids)) + ours.trained
        tokens += len(row.ids)
        trained += sum(row.trained)
        outside += sum(now and not ought for now, ought in zip(row.trained, wanted, strict=True))
        stops += sum(now and ought and token == stop
                     for token, now, ought in zip(row.ids, row.trained, wanted, strict=True))
        begun_twice += row.ids[:2] == [bos, bos]
        if ours is right[0]:
            pieces = [*(tokenizer.decode([token]) for token in row.ids), ""]
            print(name, "".join("⟦" * (now > before) + "⟧" * (now < before) + piece for (before, now), piece in zip(
                pairwise([False, *row.trained, False]), pieces, strict=True)), "", sep="\n")
    sums.append(f"{name:<18}{tokens:>8}{trained:>9}{outside:>16}{stops:>15}{begun_twice:>9}")
print(f"{'ten conversations':<18}{'tokens':>8}{'trained':>9}{'of no answer':>16}{'stop tokens':>15}{'two BOS':>9}")
print(*sums, sep="\n")
