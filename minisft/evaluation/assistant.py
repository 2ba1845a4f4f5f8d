"""A model folder that can be talked to: network, tokenizer and chat template together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from minisft.data.chat import Renderer
from minisft.data.conversation import Turn
from minisft.data.jinja import choose_template
from minisft.data.records import SHORT
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.evaluation.decoding import Decoder
from minisft.evaluation.generate import generate, stream
from minisft.evaluation.sampling import GREEDY, Sampling
from minisft.model.llama import Llama
from minisft.model.peft import PeftFolder, is_adapter


@dataclass(frozen=True)
class Assistant:
    """A network and the renderer of its chat template."""

    model: Llama
    renderer: Renderer
    name: str  # the folder's

    @classmethod
    def load(cls, path: str | Path, *, template: str = "", templates: str = "", dtype: torch.dtype = torch.float32,
             device: torch.device | str = "cpu") -> "Assistant":
        """The model in the Hugging Face folder `path`, in `dtype`; or the one that an adapter there makes of its base.

        `template` is the name of a chat template, built in or of the TOML file `templates`; empty: the one that the
        folder tells. Raises UserError for folders that are broken, and where no template is known.
        """
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such folder; name a Hugging Face folder, such as runs/my/final")
        home = path  # of the tokenizer
        if is_adapter(path) and not (Path(path) / "tokenizer.json").exists():
            home = PeftFolder(path).base_folder()
        tokenizer = Tokenizer(home)
        chosen = choose_template(template, load_templates(templates or None), tokenizer, option="--template")
        renderer = Renderer(chosen, tokenizer)
        return cls(Llama.from_pretrained(path, dtype=dtype, device=device), renderer, Path(path).resolve().name)

    @cached_property
    def decoder(self) -> Decoder:
        """The network, ready to go on with one text fast."""
        return Decoder(self.model, packed=True)

    def answer(self, conversations: Sequence[tuple[Turn, ...]], *, max_new_tokens: int = 512,
               sampling: Sampling = GREEDY) -> list[str]:
        """The model's next turn in each conversation. Raises UserError for one that fills the model's context."""
        prompts = [self.renderer.prompt(turns) for turns in conversations]
        context = self.model.config.max_position_embeddings
        for turns, prompt in zip(conversations, prompts, strict=True):
            if len(prompt) >= context:
                raise UserError(f"{SHORT.repr(turns[-1].content)}: {len(prompt):,} tokens with all that was said "
                                f"before, and the model's context has {context:,}; shorten the question, or the "
                                "answers before it with --max-new-tokens")
        answers = generate(self.model, prompts, max_new_tokens=max_new_tokens, stop_ids=self.renderer.stop_ids(),
                           sampling=sampling)
        return [self.renderer.tokenizer.decode(ids) for ids in answers]

    def tokens(self, turns: tuple[Turn, ...], *, max_new_tokens: int = 512,
               sampling: Sampling = GREEDY) -> Iterator[int]:
        """The tokens of the model's next turn, as they come to be."""
        found = stream(self.decoder, [self.renderer.prompt(turns)], max_new_tokens=max_new_tokens,
                       stop_ids=self.renderer.stop_ids(), sampling=sampling)
        return (token for _, token in found)
