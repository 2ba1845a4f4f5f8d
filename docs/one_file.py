"""Supervised fine-tuning of Llama-3 in one file: from conversations to a model folder that transformers loads.

    python docs/one_file.py MODEL DATA.jsonl --template llama3 --steps 100 --out FOLDER
    torchrun --nproc-per-node 8 docs/one_file.py MODEL DATA.jsonl ...       the same steps, on eight GPUs

A pretrained model continues a text. Shown a few thousand conversations, with a loss on the answers only, it learns to
answer. This file is all there is to that. Read it from top to bottom; it follows the data:

    messages --encode--> ids and mask --pack--> streams --Llama--> sum of losses --AdamW--> weights --export--> folder

There is no batch dimension and no padding: a stream is one row of tokens, document (conversation) after document.
Here are two, a of four tokens and b of three:

    ids         a0  a1  a2  a3 | b0  b1  b2
    trained      0   0   1   1 |  0   1   1       the answers
    targets      -  a2  a3   - | b1  b2   -       what each position should predict; "-" is IGNORED, -100
    positions    0   1   2   3 |  0   1   2       each document starts at 0 and sees nothing of the others

Six mistakes are silent: the loss still falls, and only the model is worse. Each is marked TRAP where it would happen:
double BOS, the missing stop token, special tokens in content, the shift, leaking documents, the mean of means.
"""

import argparse
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, count, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the target of a position that is not trained: no token has this id, and it adds nothing to the loss
# Fields that change what a record or a message means, which this file does not read: those with one are left out.
OTHER = {*("system", "train", "trainable", "loss", "loss_mask", "mask", "chosen", "rejected", "image", "video"),
         *("images", "audio", "tools", "functions", "tool_calls", "function_call", "reasoning_content", "history")}

Turn = tuple[str, str, int]  # role, content, 1 if it is trained
Document = tuple[list[int], list[int]]  # the token ids of a conversation and, as long, 1 where a token is trained
Pack = list[Document]

# ---- 1. Conversations -> token ids and mask --------------------------------------------------------------------------
class Template(NamedTuple):
    """A conversation is begin, and for each turn header, content, stop, after. Names in <|...|> are control tokens."""
    begin: str
    header: tuple[str, ...]
    stop: str
    after: str
    trim: bool  # strip white space around each content


TEMPLATES = {
    "llama3": Template(begin="<|begin_of_text|>", header=("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"),
                       stop="<|eot_id|>", after="", trim=True),
    "chatml": Template(begin="", header=("<|im_start|>", "{role}\n"), stop="<|im_end|>", after="\n", trim=False),
}


def turns_of(messages: list[dict]) -> list[Turn]:
    """[{"role": "user", "content": "Hi"}, ...] -> turns: an optional system turn, then user and assistant in turn.

    A blank system turn is dropped, as are an answer before the first question and what follows the last answer. Any
    other disorder raises ValueError with a reason to be counted: a guess would train on the wrong text.
    """
    turns = []
    for message in messages:
        role, content = message["role"], message["content"]
        weight = message.get("weight", message.get("loss_weight", 1))
        if isinstance(content, list) and all(part.get("type") == "text" for part in content):
            content = "".join(part.get("text", part.get("value")) for part in content)
        if not isinstance(content, str) or message.keys() & OTHER or weight not in (0, 1):
            raise ValueError("a turn is not plain text with a weight of 0 or 1")
        if role != "system" or content.strip():
            turns.append((role, content, int(weight) if role == "assistant" else 0))
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    first = int(bool(turns) and turns[0][0] == "system")
    if [role for role, *_ in turns[first : first + 2]] == ["assistant", "user"]:
        del turns[first]
    roles = [role for role, *_ in turns[first:]]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) or not all(text.strip() for _, text, _ in turns):
        raise ValueError("user and assistant do not alternate, or a turn is blank")
    return turns


def encode(turns: list[Turn], template: Template, tokenizer: Tokenizer) -> Document:
    """Turns -> token ids and mask. A piece of text is tokenised once, with its mask; nobody searches for it later.

    TRAP, double BOS: tokenizers add <|begin_of_text|> by themselves, and templates have it too. Here only one does.
    TRAP, the missing stop token: it is trained with the answer, or the model never learns to end. The header before an
    answer is not trained: the program that serves the model writes it.
    TRAP, special tokens in content: a user who types "<|eot_id|>" ends no turn; content is tokenised as plain text.
    """
    ids, trained = [], []

    def add(part: str, mask: int = 0, *, is_control: bool = False) -> None:
        new = [tokenizer.token_to_id(part)] if is_control else tokenizer.encode(part, add_special_tokens=False).ids
        ids.extend(new)
        trained.extend([mask] * len(new))

    add(template.begin, is_control=bool(template.begin))
    for role, content, mask in turns:
        content = content.strip() if template.trim else content
        *header, gap = (part.format(role=role) for part in template.header)
        for part in header:
            add(part, is_control=part.startswith("<|"))
        if role == "assistant":  # on its own: generation starts here, so the same tokens come out as in use
            add(gap)
            add(content, mask)
        else:
            add(gap + content)
        add(template.stop, mask, is_control=True)
        add(template.after)
    return ids, trained


def load_tokenizer(folder: Path, template: Template) -> Tokenizer:
    """tokenizer.json with special tokens switched off in texts; the template's control tokens must be in it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for name in (template.begin, *template.header, template.stop):
        if name.startswith("<|") and tokenizer.token_to_id(name) is None:
            sys.exit(f"{folder}/tokenizer.json: {name} is missing; choose the --template this model was made for")
    return tokenizer


def read(path: Path, template: Template, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Document], Counter[str]]:
    """The documents of a JSONL of {"messages": [...]}, and how many conversations were left out, by reason."""
    documents, left_out = [], Counter()
    lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
    for number, line in ((number, line) for number, line in lines if line.strip()):
        try:
            record = json.loads(line)
            ids, trained = encode(turns_of(record["messages"]), template, tokenizer)
            is_more = bool(record.keys() & OTHER) or record.get("weight", record.get("loss_weight", 1)) != 1
            if is_more or len(ids) > seq_len or not any(trained):
                raise ValueError("a record with a weight, or of more than messages" if is_more else
                                 "longer than --seq-len" if any(trained) else "nothing to train on")
            documents.append((ids, trained))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            sys.exit(f'{path}:{number}: not {{"messages": [{{"role": ..., "content": ...}}, ...]}} ({error!r})')
        except ValueError as reason:
            left_out[str(reason)] += 1
    return documents, left_out


# ---- 2. Documents -> packs -> steps ----------------------------------------------------------------------------------
def steps(documents: list[Document], *, seq_len: int, packs: int, seed: int) -> Iterator[list[Pack]]:
    """The packs of each step, at most `packs` of at most `seq_len` tokens, epoch after epoch without end.

    They depend on the arguments only, so every rank knows every step without asking. The packs of an epoch are spread
    evenly: a last step with the one pack left over would give each of its tokens the weight of `packs` others.
    """
    for epoch in count():
        filled, room = [], 0
        for document in random.Random(f"{seed} {epoch}").sample(documents, len(documents)):
            if len(document[0]) > room:  # the next pack; this one stays as short as it is, without padding
                filled.append([])
                room = seq_len
            filled[-1].append(document)
            room -= len(document[0])
        number = -(-len(filled) // packs)
        for i in range(number):
            yield filled[i * len(filled) // number : (i + 1) * len(filled) // number]


class Stream(NamedTuple):
    """A pack on its way through the network: T tokens, document after document."""
    ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64: the token to predict, or IGNORED
    positions: Tensor  # (T,) fp32: of each token in its document
    lengths: list[int]  # of the documents
    cu_seqlens: Tensor  # (documents + 1,) int32: lengths [4, 3] -> [0, 4, 7]


def stream(pack: Pack, device: torch.device) -> Stream:
    """TRAP, the shift: position t predicts token t + 1. Targets are shifted here, and nowhere else.

    Many networks shift inside their loss; shifted twice, a model learns to predict the token after the next. The last
    token of a document has no target: what follows it in the stream is another conversation.
    """
    targets = [[token if is_trained else IGNORED for token, is_trained in zip(ids[1:], trained[1:], strict=True)]
               + [IGNORED] for ids, trained in pack]
    lengths = [len(ids) for ids, _ in pack]
    return Stream(torch.tensor([token for ids, _ in pack for token in ids], device=device),
                  torch.tensor([target for part in targets for target in part], device=device),
                  torch.cat([torch.arange(length, dtype=torch.float32) for length in lengths]).to(device),
                  lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))


# ---- 3. The network --------------------------------------------------------------------------------------------------
# T tokens of the stream, D model width, H query heads, K key/value heads, E head width, V vocabulary. Modules have
# Hugging Face's names, so weights are read and written as they are.

def rotations(positions: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """(T,) -> cosines and sines, (T, 1, E) each, in fp32: bf16 cannot tell position 257 from 256.

    Channel pair i turns by theta^(-2i/E) radians a token (Su et al. 2021). From Llama-3.1 on, pairs that made fewer
    than `low_freq_factor` turns in the old context are slowed down by `factor`, those up to `high_freq_factor` partly.
    """
    width, rope = config["head_dim"], config["rope"]
    radians = rope["rope_theta"] ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * radians / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        radians = radians * (kept + (1 - kept) / rope["factor"])
    angles = (positions[:, None] * radians).repeat(1, 2)[:, None]  # pair i is channels i and i + E/2
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """(T, heads, E) -> (T, heads, E)"""
    first, second = x.float().chunk(2, dim=-1)
    return (x * rotation[0] + torch.cat((-second, first), dim=-1) * rotation[1]).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Stream) -> Tensor:
    """(T, H, E) each -> (T, H, E). A token attends to itself and to the earlier tokens of its own document.

    TRAP, leaking documents: without boundaries every conversation is read as the end of a long one. The flash kernel
    takes the boundaries as an argument; elsewhere each document is a call of its own.
    """
    if q.is_cuda and q.dtype == torch.bfloat16:
        from torch.nn.attention.varlen import varlen_attn  # imported late: it loads the compiler
        ends, longest = tokens.cu_seqlens, max(tokens.lengths)
        return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))  # all before, none after
    documents = zip(*(x.transpose(0, 1).split(tokens.lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*d, is_causal=True) for d in documents], dim=1).transpose(0, 1)


class Block(nn.Module):
    """Attention mixes tokens, the MLP (SwiGLU, Shazeer 2020) works on each alone; both add to what passes through."""

    def __init__(self, config: dict):
        super().__init__()
        width, inner, self.head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        queries, keys = (config[f"num_{kind}_heads"] * self.head_dim for kind in ("attention", "key_value"))
        linear = partial(nn.Linear, bias=False)
        self.self_attn = nn.ModuleDict({"q_proj": linear(width, queries), "k_proj": linear(width, keys),
                                        "v_proj": linear(width, keys), "o_proj": linear(queries, width)})
        self.mlp = nn.ModuleDict({"gate_proj": linear(width, inner), "up_proj": linear(width, inner),
                                  "down_proj": linear(inner, width)})
        self.input_layernorm = nn.RMSNorm(width, config["rms_norm_eps"])  # x / sqrt(mean(x²) + eps) · weight
        self.post_attention_layernorm = nn.RMSNorm(width, config["rms_norm_eps"])

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], tokens: Stream) -> Tensor:
        """(T, D) -> (T, D)"""
        y, attention, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (attention[name](y).unflatten(-1, (-1, self.head_dim)) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, shared = rotate(q, rotation), rotate(k, rotation), q.shape[1] // k.shape[1]
        k, v = (z.repeat_interleave(shared, dim=1) for z in (k, v))  # (T, K, E) -> (T, H, E): GQA, Ainslie et al. 2023
        x = x + attention["o_proj"](attend(q, k, v, tokens).flatten(1))
        y = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))


class Llama(nn.Module):
    """Embedding, blocks, norm, head. `config` is what `read_config` returns."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, width, words = config, config["hidden_size"], config["vocab_size"]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(words, width), "norm": nn.RMSNorm(width, config["rms_norm_eps"]),
            "layers": nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))})
        if not config["tie_word_embeddings"]:  # a tied head is the embedding, and no parameter of its own
            self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Stream) -> Tensor:
        """-> the SUM of the trained tokens' losses, in nats. Dividing it is the step's business.

        Only trained positions meet the head, 1,024 at a time, and their logits are made again in the backward pass:
        those of 8,192 tokens of Llama-3 would take 4.2 GB. With nothing to train on the sum is 0, and has a gradient.
        """
        embedding, trained = self.model["embed_tokens"], tokens.targets != IGNORED
        head = embedding if self.config["tie_word_embeddings"] else self.lm_head
        x, rotation = embedding(tokens.ids), rotations(tokens.positions, self.config)
        for block in self.model["layers"]:
            x = block(x, rotation, tokens)
        x = self.model["norm"](x)[trained]  # (N, D)

        def loss_sum(x: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, head.weight).float(), targets, reduction="sum")

        chunks = zip(x.split(1024), tokens.targets[trained].split(1024), strict=True)
        return sum(checkpoint(loss_sum, *chunk, use_reentrant=False) for chunk in chunks)


# ---- 4. Hugging Face folders -----------------------------------------------------------------------------------------
def read_config(folder: Path) -> dict:
    """config.json, with what it may leave out, and its rotary part under "rope"."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = {"rope_theta": raw.get("rope_theta", 10_000.0), **(raw.get("rope_parameters") or {}),
            **(raw.get("rope_scaling") or {})}
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if raw.get("model_type") != "llama" or raw.get("hidden_act", "silu") != "silu" or raw.get("attention_bias") \
            or raw.get("mlp_bias") or rope["rope_type"] not in ("default", "llama3"):
        sys.exit(f"{folder}/config.json: not a Llama-3 network, and this file knows no other")
    heads = raw["num_attention_heads"]
    return {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads, "rms_norm_eps": 1e-6, "rope": rope,
            "tie_word_embeddings": False, **{name: value for name, value in raw.items() if value is not None}}


def load_model(folder: Path, device: torch.device, precision: str) -> Llama:
    """The network with the weights of `folder`, sharded: each rank reads and keeps its share of the rows, in fp32.

    fully_shard gathers the weights of a block just before they are used, as bf16 if we compute in it. AdamW updates the
    fp32 shards: bf16 numbers near 0.02 are 1.2e-4 apart, so an update of 1e-5 would round to nothing.
    """
    with torch.device("meta"):  # shapes only, because the whole model may not fit on one GPU
        model = Llama(read_config(folder))
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy() if precision == "fp32" else MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)  # cosines stay in fp32
    for part in (*model.model["layers"], model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    files = [safe_open(file, "pt") for file in sorted(folder.glob("model*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    for name, parameter in model.named_parameters():
        saved, shape = where[name].get_slice(name) if name in where else None, list(parameter.shape)
        if saved is None or saved.get_shape() != shape or saved.get_dtype() not in ("F32", "BF16", "F16"):
            sys.exit(f"{folder}: {name} is missing from model*.safetensors, or is no {shape} in F32, BF16 or F16")
        rows = parameter.detach().to_local()  # of 10 rows, four ranks hold 3, 3, 3 and 1
        first = dist.get_rank() * -(-len(parameter) // dist.get_world_size())
        if len(rows):
            rows.copy_(saved[first : first + len(rows)])
    return model


def export(model: Llama, base: Path, out: Path, template: Template, tokenizer: Tokenizer, precision: str) -> None:
    """Write `out`: weights, config.json, the tokenizer with its chat template, and where generation ends."""
    dtype, weights = torch.float32 if precision == "fp32" else torch.bfloat16, {}
    for name, parameter in model.named_parameters():
        whole = parameter.detach().full_tensor()  # all ranks gather it, one writes it
        if dist.get_rank() == 0:
            weights[name] = whole.to("cpu", dtype)
    if dist.get_rank():
        return
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    written = {name: json.loads((base / name).read_text(encoding="utf-8")) if (base / name).exists() else {}
               for name in ("config.json", "tokenizer_config.json", "generation_config.json")}
    written["config.json"] |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    written["tokenizer_config.json"]["chat_template"] = jinja(template)  # or whoever serves the model must guess
    written["generation_config.json"]["eos_token_id"] = tokenizer.token_to_id(template.stop)
    for name, content in written.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def jinja(template: Template) -> str:
    """The template in the language of transformers and vLLM, which then write the tokens that were trained."""
    before, between = "".join(template.header).split("{role}")
    begin, before, between, after = map(json.dumps, (template.begin, before, between, template.stop + template.after))
    content = "message['content']" + (" | trim" if template.trim else "")
    return (f"{{{{ {begin} }}}}{{% for message in messages %}}"
            f"{{{{ {before} + message['role'] + {between} + {content} + {after} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {before} + 'assistant' + {between} }}}}{{% endif %}}")


# ---- 5. Training -----------------------------------------------------------------------------------------------------
def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """The rate of `step` (from 0): a line up to `peak`, then half a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def train_step(model: Llama, optimizer: torch.optim.Optimizer, packs: list[Pack], device: torch.device) -> Tensor:
    """One update from the packs of a step, dealt out to the ranks -> loss (nats a trained token), norm of its gradient.

    TRAP, the mean of means: averaged by pack, and then by rank, a token counts for more the fewer others share its
    pack, and another number of GPUs trains another model. So sum, and divide once: by the whole step's trained tokens.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    step_tokens = sum(sum(trained) for pack in packs for _, trained in pack)  # over all ranks: each knows the plan
    packs = packs + [[([0], [0])]] * (-len(packs) % ranks)  # untrained, so that no rank waits for one with fewer packs
    loss = torch.zeros((), device=device)
    for pack in packs[rank::ranks]:
        part = model(stream(pack, device)) / step_tokens
        (part * ranks).backward()  # gradients add up over packs; fully_shard averages over ranks where we want the sum
        loss += part.detach()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0).full_tensor()
    dist.all_reduce(loss)
    if not torch.isfinite(norm + loss):  # all ranks have the same two numbers, so all stop
        sys.exit("the loss or its gradient is not finite: lower --lr, or check the base model")
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack((loss, norm))


def main(args: argparse.Namespace) -> None:
    """From the command line to the exported model."""
    template = TEMPLATES[args.template]
    tokenizer = load_tokenizer(args.model, template)
    documents, left_out = read(args.data, template, tokenizer, args.seq_len)  # before ranks connect, or they time out
    if not documents:
        sys.exit(f"{args.data}: no conversation is left to train on: {dict(left_out)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # no torchrun
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", **alone)
    if is_main := dist.get_rank() == 0:
        print(f"{len(documents)} conversations; left out: {dict(left_out)}", file=sys.stderr)
    model = load_model(args.model, device, args.precision)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    plan = islice(steps(documents, seq_len=args.seq_len, packs=args.packs, seed=args.seed), args.steps)
    for step, packs in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=args.steps, warmup=args.warmup, peak=args.lr)
        loss, grad_norm = train_step(model, optimizer, packs, device).tolist()
        if is_main:
            print(json.dumps({"step": step + 1, "loss": loss, "grad_norm": grad_norm}), flush=True)
    export(model, args.model, args.out, template, tokenizer, args.precision)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of a Llama")
    parser.add_argument("data", type=Path, help='JSONL of {"messages": [{"role": ..., "content": ...}, ...]}')
    parser.add_argument("--template", choices=TEMPLATES, default="llama3")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a pack, at most")
    parser.add_argument("--packs", type=int, default=32, help="packs in a step over all ranks, at most")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=10, help="steps up to the peak")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the computation")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    main(parser.parse_args())
