"""Greedy generation equals transformers', a cache changes nothing, and neither does what else is in the batch."""

import json
import math
import os

import pytest
import torch
from oracles.tiny_llama import CONFIG, write_tiny_llama

from minisft.errors import UserError
from minisft.generate import assistant as module
from minisft.generate import decoding
from minisft.generate.assistant import Sampling, generate, stream
from minisft.generate.decoding import CachedDecoder, Product
from minisft.model.llama import Llama
from minisft.model.llama_config import LlamaConfig
from minisft.pretrained import from_pretrained

PROMPTS = [[309, 5, 6], [309, 80, 81, 82, 83, 84, 85], [40], [309, 5, 6, 7] * 20]


def expected(folder, prompts, count, **options):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"eos_token_id": None, **options}
    outs = [model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
            for prompt in prompts]
    return [out[0, len(prompt) :].tolist() for out, prompt in zip(outs, prompts, strict=True)]


def without_cache(model, prompt, count):
    """The most probable continuation, the whole text computed again for every token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model.logits(torch.tensor(text))[-1].argmax()))
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def model(base):
    return from_pretrained(base)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_many_prompts_at_once_say_what_each_says_in_transformers(base, model, penalty):
    sampling = Sampling(repetition_penalty=penalty)
    options = {"max_new_tokens": 20, "stop_ids": set(), "sampling": sampling}
    theirs = expected(base, PROMPTS, 20, repetition_penalty=penalty)
    assert generate(model, PROMPTS, **options) == theirs
    assert [generate(model, [prompt], **options)[0] for prompt in PROMPTS] == theirs


def test_texts_that_stop_leave_the_others_as_they_are(model):
    options = {"max_new_tokens": 20, "sampling": Sampling(temperature=2.0)}  # greedily these texts repeat themselves
    whole = generate(model, PROMPTS, stop_ids=set(), **options)
    stop = {whole[0][3], whole[1][1], whole[3][7]}
    cut = [answer[: next((i for i, token in enumerate(answer) if token in stop), 20)] for answer in whole]
    assert len({len(answer) for answer in cut}) > 2  # they end at different steps
    assert generate(model, PROMPTS, stop_ids=stop, **options) == cut


def test_generation_ends_before_the_stop_token_at_which_transformers_ends(base, model):
    stop = expected(base, PROMPTS[1:2], 20)[0][4]
    theirs = expected(base, PROMPTS[1:2], 20, eos_token_id=stop)[0]
    assert len(theirs) <= 5
    assert generate(model, PROMPTS[1:2], max_new_tokens=20, stop_ids={stop}) == [theirs[:-1]]


def test_with_a_cache_as_without(model):
    assert generate(model, PROMPTS, max_new_tokens=12, stop_ids=set()) == [without_cache(model, p, 12) for p in PROMPTS]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_step_is_the_models_forward_pass(dtype, tied, texts, packed):
    """Also with biases, a tied head, sizes that no tile fits, and rounded weights."""
    config = LlamaConfig(vocab_size=101, hidden_size=40, intermediate_size=72, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=10, attention_bias=True, mlp_bias=True,
                         tie_word_embeddings=tied, max_position_embeddings=64, rope_theta=10_000.0)
    with torch.device("meta"):
        ours = Llama(config).to(dtype)
    ours.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    wide = Llama(config)
    wide.load_state_dict(ours.state_dict())
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]][:texts]
    decoder = CachedDecoder(ours, packed=packed)
    with torch.no_grad():
        logits, cache = decoder.prefill(prompts, positions=10)
        for token in (20, 21):
            prompts = [[*prompt, token] for prompt in prompts]
            logits = decoder.step(torch.full((texts,), token), cache)
        truth = torch.stack([wide.logits(torch.tensor(prompt))[-1] for prompt in prompts])
    error = (logits - truth).norm() / truth.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("outputs", [(64,), (192, 64, 64), (320,), (101, 3)])
@pytest.mark.parametrize(("dtype", "packed"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_products_are_sums_rounded_once(outputs, dtype, packed):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.nn.Linear(48, n, dtype=dtype).requires_grad_(False) for n in outputs]
    for parameter in (p for each in maps for p in each.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weight, bias = torch.cat([each.weight for each in maps]), torch.cat([each.bias for each in maps])
    for rows in (1, 2, 5):
        x = torch.randn(rows, 48, generator=generator)
        truth = x.to(dtype).double() @ weight.double().T + bias
        y = Product(*maps, packed=packed)(x)
        assert y.dtype == x.dtype
        eps = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 20)  # fp32 rounds within the sum as well
        assert torch.allclose(y.double(), truth, rtol=eps, atol=eps)


@pytest.mark.parametrize(("hidden", "head"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16),
                                              (torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_logits_are_never_rounded_to_bf16(hidden, head):
    """5,003 tokens whose logits are near 20, where bf16 has steps of 0.125: in bf16 hundreds of them are the best."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 576, generator=generator).to(hidden)
    x[:, 0] = 20
    weight = (torch.randn(5003, 576, generator=generator) * 1e-3).to(head)
    weight[:, 0] = 1
    truth = x.double() @ weight.to(hidden).double().T
    found = decoding.logits(x, weight)
    assert found.dtype == torch.float32
    assert (found - truth).abs().max() < 1e-4
    assert torch.equal(found.argmax(dim=1), truth.argmax(dim=1))
    assert len(set(truth.bfloat16()[0].tolist())) < 5 < len(set(found[0].tolist()))


@pytest.mark.parametrize("packed", [False, True])
def test_first_and_later_tokens_have_fp32_logits(base, packed, monkeypatch):
    seen = []

    def logits(hidden, head):
        seen.append((hidden, head, found := kept(hidden, head)))
        return found

    kept = decoding.logits
    monkeypatch.setattr(decoding, "logits", logits)
    decoder = CachedDecoder(from_pretrained(base, dtype=torch.bfloat16), packed=packed)
    assert len(list(stream(decoder, PROMPTS, max_new_tokens=3, stop_ids=set()))) == 12
    assert len(seen) == 3
    for hidden, head, found in seen:
        truth = hidden.double() @ head.double().T
        assert (found - truth).abs().max() < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logits_that_are_no_numbers_choose_no_token(base, temperature):
    broken = from_pretrained(base)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="the model's logits are not finite: its weights are broken"):
        generate(broken, PROMPTS, max_new_tokens=3, stop_ids=set(), sampling=Sampling(temperature=temperature))


def test_a_draw_depends_on_seed_and_prompt_and_not_on_the_batch(model):
    def said(prompts, seed):
        return generate(model, prompts, max_new_tokens=15, stop_ids={7},
                        sampling=Sampling(temperature=1.2, top_k=200, top_p=0.95, repetition_penalty=1.1, seed=seed))

    assert said(PROMPTS, 1) == [said([prompt], 1)[0] for prompt in PROMPTS] == said(PROMPTS[::-1], 1)[::-1]
    assert said(PROMPTS, 1) != said(PROMPTS, 2)


def test_more_prompts_than_the_cache_holds_wait(model, monkeypatch):
    whole = generate(model, PROMPTS, max_new_tokens=8, stop_ids=set())
    monkeypatch.setattr(module, "CACHE_BYTES", CachedDecoder(model).bytes_per_position() * 90)  # one, then three
    assert generate(model, PROMPTS, max_new_tokens=8, stop_ids=set()) == whole


def test_tokens_come_one_step_after_another(model):
    pairs = list(stream(model, PROMPTS[:3], max_new_tokens=4, stop_ids=set()))
    assert [sorted(i for i, _ in pairs[step : step + 3]) for step in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert [[token for i, token in pairs if i == text] for text in range(3)] == generate(
        model, PROMPTS[:3], max_new_tokens=4, stop_ids=set())


def test_nothing_to_generate(model):
    assert generate(model, [], max_new_tokens=3, stop_ids=set()) == []
    assert generate(model, [[5], [6]], max_new_tokens=0, stop_ids=set()) == [[], []]


def test_an_answer_ends_with_the_context_and_a_prompt_that_fills_it_is_refused(tmp_path):
    folder = write_tiny_llama(tmp_path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 8}))
    model = from_pretrained(folder)
    short = generate(model, [[309, 5, 6], [40] * 7], max_new_tokens=20, stop_ids=set())
    assert [len(answer) for answer in short] == [5, 1]
    assert short[0] == without_cache(model, [309, 5, 6], 5)
    with pytest.raises(UserError, match="a prompt of 8 tokens leaves nothing to generate: the model's context has 8; "
                                        "shorten the conversation"):
        generate(model, [[40] * 8], max_new_tokens=1, stop_ids=set())
    with pytest.raises(UserError, match="a prompt is empty"):
        generate(model, [[5], []], max_new_tokens=1, stop_ids=set())


@pytest.mark.skipif("MINISFT_SMOLLM2" not in os.environ, reason="MINISFT_SMOLLM2 names no folder of SmolLM2-135M")
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_smollm2_says_what_it_says_in_transformers(penalty):
    folder = os.environ["MINISFT_SMOLLM2"]
    prompts = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198], [504, 2365, 282, 260]]
    model, theirs = from_pretrained(folder), expected(folder, prompts, 24, repetition_penalty=penalty)
    sampling = Sampling(repetition_penalty=penalty)
    assert generate(model, prompts, max_new_tokens=24, stop_ids=set(), sampling=sampling) == theirs
    assert generate(model, prompts[:1], max_new_tokens=24, stop_ids=set(), sampling=sampling) == theirs[:1]
