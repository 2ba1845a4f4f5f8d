"""A plain loop in a page of torch, right in every exhibit, and with each fault at a switch: the planted controls.

`Plain(fault="leak")` has one fault, `fault="keep_empty mean_of_means"` two. Each is written as it stands in somebody's
script: the wrong line beside the right one. Ranks are simulated: their rows take turns in one process, and what a
process group would add up or average is added up or averaged.
"""

import copy
import json
import random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from silent.world import BEGIN, HEADER, HEADER_END, IGNORED, PAD, STOP, TEMPLATE, Job, Row, Run, Trainer, World

FAULTS = {
    "train_all": "labels are the ids", "train_header": "the header before an answer is trained",
    "stop_untrained": "the stop token after an answer is not trained",
    "double_bos": "the tokenizer adds a BOS to a text that has one",
    "special_in_content": "the conversation is rendered to one text and tokenised with special tokens on",
    "boundary": "prompt and completion are joined before tokenising, and the mask counts the prompt's own tokens",
    "first_turn": "only the first answer is trained",
    "first_untrained": "an answer's first token is not trained", "ignore_weight": "a turn's weight is not read",
    "ignore_columns": "further columns are not looked at",
    "ignore_duplicates": "of a key that stands twice the last counts",
    "keep_empty": "rows without a trained token stay",
    "double_shift": "labels that are shifted already are shifted again", "leak": "packs are one causal document",
    "positions": "positions run through a pack, in bf16",
    "mean_of_means": "each micro-batch is averaged, then the averages",
    "mean_of_ranks": "each rank is averaged, then the averages",
    "short_tail": "the last window is divided as a full one",
    "pad_by_id": "labels that equal the padding id are ignored", "drop_last": "an incomplete last batch is dropped",
    "bf16_masters": "weights and moments are bf16", "decay_all": "weight decay acts on all parameters",
    "replay": "a resumed run starts with the first document", "skip": "a resumed run skips too far",
    "lose_moments": "the optimizer's state is not restored", "no_template": "the export has no chat template",
    "other_template": "the export has ChatML", "head_lost": "the export takes the head for tied",
    "own_head_lost": "a tied model's own head is not read", "eval_batches": "the held-out loss is the mean of batches",
}
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

Document = tuple[list[int], list[int]]  # ids, labels


def open_trainer(name: str, fault: str) -> "Plain":
    """The loop without a fault, or with some."""
    return Plain(fault)


class Plain(Trainer):
    """The loop; `fault` names what is planted."""

    def __init__(self, fault: str = ""):
        self.name, self.fault = "plain", set(fault.split())
        assert self.fault <= FAULTS.keys(), fault
        self.about, self.versions = "a loop in a page; ranks are simulated", f"torch {torch.__version__}"

    def has(self, fault: str) -> bool:
        """Is it planted?"""
        return fault in self.fault

    def rows(self, job: Job, world: World) -> list[Row]:
        return [Row(ids, labels) for ids, labels in self.documents(job, world, job.data)]

    # ---- from records to documents -----------------------------------------------------------------------------------

    def documents(self, job: Job, world: World, records: tuple[dict, ...]) -> list[Document]:
        """Ids and labels, cut to the length. What is then without a target is left out."""
        found = []
        for record in records:
            record = json.loads(record, object_pairs_hook=self.unique) if isinstance(record, str) else record
            if len(record) > 1 + ("completion" in record) and not self.has("ignore_columns"):
                raise ValueError(f"a record says two things: {', '.join(record)}")
            ids, labels = self.dialogue(record["messages"], world) if "messages" in record else self.pair(record, world)
            ids, labels = ids[: job.length], labels[: job.length]
            if any(label != IGNORED for label in labels[1:]) or self.has("keep_empty"):
                found.append((ids, labels))
        return found

    def unique(self, pairs: list[tuple[str, object]]) -> dict:
        """An object of JSON; a key that stands twice is refused."""
        if len(dict(pairs)) < len(pairs) and not self.has("ignore_duplicates"):
            raise ValueError(f"a key stands twice: {', '.join(key for key, _ in pairs)}")
        return dict(pairs)

    def dialogue(self, messages: list[dict], world: World) -> Document:
        """Llama-3's format, segment by segment."""
        tokenizer = copy.deepcopy(world.tokenizer)
        tokenizer.encode_special_tokens = not self.has("special_in_content")
        control, ids, labels = tokenizer.token_to_id, [], []

        def add(part: str | int, trained: bool = False) -> None:
            new = [part] if isinstance(part, int) else tokenizer.encode(part, add_special_tokens=False).ids
            ids.extend(new)
            labels.extend(new if trained or self.has("train_all") else [IGNORED] * len(new))

        answers = 0
        for message in messages:
            answer = message["role"] == "assistant" and (message.get("weight", 1) != 0 or self.has("ignore_weight"))
            answers += answer
            trained = answer and (answers == 1 or not self.has("first_turn"))
            if not ids:
                add(control(BEGIN))
                if self.has("double_bos"):
                    add(control(BEGIN))
            for part in (control(HEADER), message["role"], control(HEADER_END), "\n\n"):
                add(part, trained and self.has("train_header"))
            start = len(ids)
            add(message["content"].strip(), trained)
            if self.has("first_untrained"):
                labels[start] = IGNORED
            add(control(STOP), trained and not self.has("stop_untrained"))
        return ids, labels

    def pair(self, record: dict, world: World) -> Document:
        """A prompt and its completion as they stand."""
        def encode(text: str) -> list[int]:
            return world.tokenizer.encode(text, add_special_tokens=False).ids

        begin, stop = (world.tokenizer.token_to_id(name) for name in (BEGIN, STOP))
        prompt, answer = [begin, *encode(record["prompt"])], [*encode(record["completion"]), stop]
        ids = [*prompt, *answer]
        if self.has("boundary"):
            ids = [begin, *encode(record["prompt"] + record["completion"]), stop]
        return ids, [IGNORED] * len(prompt) + ids[len(prompt):]

    # ---- from documents to batches -----------------------------------------------------------------------------------

    def packs(self, documents: list[Document], job: Job) -> list[list[Document]]:
        """Documents in rows, in their order."""
        found, room = [], 0
        for document in documents:
            if len(document[0]) > room or not job.packing:
                found.append([])
                room = job.length
            found[-1].append(document)
            room -= len(document[0])
        return found

    def batch(self, packs: list[list[Document]], pad: int) -> dict[str, Tensor]:
        """(B, L) ids, targets, positions and the number of each token's document."""
        longest = max(sum(len(ids) for ids, _ in pack) for pack in packs)
        found = {name: torch.full((len(packs), longest), fill) for name, fill in
                 (("ids", pad), ("targets", IGNORED), ("positions", 0), ("document", -1))}
        for i, pack in enumerate(packs):
            start = 0
            for number, (ids, labels) in enumerate(pack):
                at = slice(start, start + len(ids))
                labels = torch.tensor(labels)
                if self.has("pad_by_id"):
                    labels[labels == pad] = IGNORED
                targets = F.pad(labels[1:], (0, 1), value=IGNORED)
                if self.has("double_shift"):
                    targets = F.pad(targets[1:], (0, 1), value=IGNORED)
                found["ids"][i, at], found["targets"][i, at] = torch.tensor(ids), targets
                found["positions"][i, at] = torch.arange(len(ids)) + (start if self.has("positions") else 0)
                found["document"][i, at] = 0 if self.has("leak") else number
                start += len(ids)
        return found

    # ---- the network -------------------------------------------------------------------------------------------------

    def losses(self, weights: dict[str, Tensor], config: dict, batch: dict[str, Tensor]) -> Tensor:
        """(B, L): the loss of each token, 0 where none is trained."""
        heads, kv, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        turn = 1 / config["rope_theta"] ** (torch.arange(0, width, 2) / width)
        angles = batch["positions"][..., None].float() * turn
        if self.has("positions"):
            angles = (batch["positions"][..., None].bfloat16() * turn.bfloat16()).float()
        cos, sin = (f(angles).repeat(1, 1, 2)[:, None] for f in (torch.cos, torch.sin))
        same = batch["document"][:, :, None] == batch["document"][:, None, :]
        mask = (same & torch.ones_like(same).tril())[:, None]

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weights[name])

        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)

        def norm(x: Tensor, name: str) -> Tensor:
            return F.rms_norm(x.float(), (x.shape[-1],), weights[name].float(), config["rms_norm_eps"]).to(x.dtype)

        x = F.embedding(batch["ids"], weights["model.embed_tokens.weight"])
        for i in range(config["num_hidden_layers"]):
            at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
            y = norm(x, f"model.layers.{i}.input_layernorm.weight")
            q, k, v = (linear(y, f"{at}{p}_proj.weight").unflatten(-1, (n, width)).transpose(1, 2)
                       for p, n in (("q", heads), ("k", kv), ("v", kv)))
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask, enable_gqa=True)
            x = x + linear(y.transpose(1, 2).flatten(2), f"{at}o_proj.weight")
            y = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
            x = x + linear(F.silu(linear(y, f"{mlp}gate_proj.weight")) * linear(y, f"{mlp}up_proj.weight"),
                           f"{mlp}down_proj.weight")
        out = linear(norm(x, "model.norm.weight"), "lm_head.weight" if "lm_head.weight" in weights else
                     "model.embed_tokens.weight").float()
        return F.cross_entropy(out.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED,
                               reduction="none").view_as(batch["targets"])

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def train(self, job: Job, world: World) -> Run:
        base = world.model(job.model)
        config, weights = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")
        if self.has("own_head_lost") and config["tie_word_embeddings"]:
            weights.pop("lm_head.weight", None)
        pad = world.tokenizer.token_to_id(STOP if job.model == "pad_is_eos" else PAD)
        documents = self.documents(job, world, job.data)
        if job.shuffle:
            random.Random(0).shuffle(documents)
        packs, size = self.packs(documents, job), job.rows * job.accumulate * job.ranks
        steps = [packs[i : i + size] for i in range(0, len(packs), size)]
        if self.has("drop_last") and len(steps[-1]) < size:
            steps.pop()
        total = job.steps or len(steps)
        saved = torch.bfloat16 if self.has("bf16_masters") and job.precision == "bf16" else torch.float32
        state = {"weights": {name: weight.to(saved) for name, weight in weights.items()}, "first": {}, "second": {},
                 "updates": 0}
        losses, order = [], [steps[i % len(steps)] for i in range(total)]
        held_out = [self.held_out(job, world, state, config, pad)] if job.held_out else []
        for i in range(total):
            if job.stop and i == job.stop:  # what a checkpoint keeps, and how the run finds its place again
                if self.has("lose_moments"):
                    state |= {"first": {}, "second": {}, "updates": 0}
                first = 0 if self.has("replay") else i + 1 if self.has("skip") else i
                order[i:] = [steps[(first + j) % len(steps)] for j in range(total - i)]
            loss, gradients = self.step(order[i], job, state["weights"], config, pad)
            losses.append(loss)
            self.update(state, gradients, job)
        held_out += [self.held_out(job, world, state, config, pad)] if job.held_out else []
        return Run(losses, held_out, self.export(world, base, state["weights"]))

    def step(self, packs: list[list[Document]], job: Job, weights: dict[str, Tensor], config: dict,
             pad: int) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradient of a step: the sum over all trained tokens, divided once by their number."""
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        used = {name: x.bfloat16() for name, x in leaves.items()} if job.precision == "bf16" else leaves
        batches = [self.batch(packs[i : i + job.rows], pad) for i in range(0, len(packs), job.rows)]
        sums = [self.losses(used, config, batch).sum() for batch in batches]
        counts = [(batch["targets"] != IGNORED).sum() for batch in batches]
        if self.has("mean_of_means"):
            loss = torch.stack([s / n for s, n in zip(sums, counts, strict=True)]).mean()
        elif self.has("mean_of_ranks"):
            each = range(job.ranks)
            loss = sum(sum(sums[r :: job.ranks]) / sum(counts[r :: job.ranks]) for r in each) / job.ranks
        elif self.has("short_tail"):
            loss = sum(s / n for s, n in zip(sums, counts, strict=True)) / job.accumulate
        else:
            loss = sum(sums) / sum(counts)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return loss.item(), {name: torch.zeros_like(leaves[name]) if g is None else g
                             for name, g in zip(leaves, found, strict=True)}

    def update(self, state: dict, gradients: dict[str, Tensor], job: Job) -> None:
        """AdamW; norms are not decayed."""
        state["updates"] += 1
        for name, g in gradients.items():
            weight, (b1, b2), t = state["weights"][name], job.betas, state["updates"]
            first = state["first"].setdefault(name, torch.zeros_like(g)).mul_(b1).add_(g, alpha=1 - b1)
            second = state["second"].setdefault(name, torch.zeros_like(g)).mul_(b2).addcmul_(g, g, value=1 - b2)
            if weight.dim() > 1 or self.has("decay_all"):
                weight.mul_(1 - job.lr * job.decay)
            weight.sub_(job.lr * (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + job.eps))

    def held_out(self, job: Job, world: World, state: dict, config: dict, pad: int) -> float:
        """The mean over all tokens of the held-out documents."""
        packs, sums, counts = self.packs(self.documents(job, world, job.held_out), job), [], []
        with torch.no_grad():
            for i in range(0, len(packs), job.rows):
                batch = self.batch(packs[i : i + job.rows], pad)
                sums.append(self.losses(state["weights"], config, batch).sum())
                counts.append((batch["targets"] != IGNORED).sum())
        if self.has("eval_batches"):
            return torch.stack([s / n for s, n in zip(sums, counts, strict=True)]).mean().item()
        return (sum(sums) / sum(counts)).item()

    def export(self, world: World, base, weights: dict[str, Tensor]):
        """A Hugging Face folder."""
        folder = world.run_folder()
        config = json.loads((base / "config.json").read_text())
        weights = {name: weight.contiguous() for name, weight in weights.items()}
        if self.has("head_lost"):
            weights.pop("lm_head.weight", None)
            config["tie_word_embeddings"] = True
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
        settings = json.loads((base / "tokenizer_config.json").read_text())
        settings["chat_template"] = CHATML if self.has("other_template") else TEMPLATE
        if self.has("no_template"):
            del settings["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder
