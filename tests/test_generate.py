"""Greedy generation is transformers', for many prompts at once."""

import os

import pytest
import torch
from oracles.tiny_llama import write_tiny_llama

from minisft.evaluation.generate import generate
from minisft.model.llama import Llama


def expected(folder, prompt, count):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None,
                         pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def test_many_prompts_at_once_are_each_alone(tmp_path):
    folder = write_tiny_llama(tmp_path)
    prompts = [[309, 5, 6], [309, 80, 81, 82, 83, 84, 85], [40]]
    answers = generate(Llama.from_pretrained(folder), prompts, max_new_tokens=12, stop_ids=set())
    assert answers == [expected(folder, prompt, 12) for prompt in prompts]


def test_generation_ends_before_the_first_stop_token(tmp_path):
    folder = write_tiny_llama(tmp_path)
    model = Llama.from_pretrained(folder)
    whole = generate(model, [[309, 5, 6]], max_new_tokens=12, stop_ids=set())[0]
    assert generate(model, [[309, 5, 6]], max_new_tokens=12, stop_ids={whole[4]})[0] == whole[: whole.index(whole[4])]
    assert generate(model, [], max_new_tokens=3, stop_ids=set()) == []


@pytest.mark.skipif("MINISFT_SMOLLM2" not in os.environ, reason="MINISFT_SMOLLM2 names no folder of SmolLM2-135M")
def test_smollm2_says_what_it_says_in_transformers():
    folder = os.environ["MINISFT_SMOLLM2"]
    prompts = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198], [504, 2365, 282, 260]]
    answers = generate(Llama.from_pretrained(folder), prompts, max_new_tokens=24, stop_ids=set())
    assert answers == [expected(folder, prompt, 24) for prompt in prompts]
