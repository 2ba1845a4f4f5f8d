"""A model to talk to: network, tokenizer and chat template."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from minisft.data.chat import Renderer
from minisft.data.conversation import Turn
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import SHORT, UserError
from minisft.formats.jinja import choose_template
from minisft.generate.decoding import CachedDecoder
from minisft.generate.sampling import GREEDY, Sampling
from minisft.generate.text import generate, stream
from minisft.lora.adapters import PeftFolder, is_adapter
from minisft.model.llama import Llama
from minisft.pretrained import from_pretrained


@dataclass(frozen=True)
class Assistant:
    """A network and the renderer of its chat template."""

    model: Llama
    renderer: Renderer
    name: str  # the folder's

    @classmethod
    def load(cls, path: str | Path, *, template: str = "", templates: str = "", dtype: torch.dtype = torch.float32,
             device: torch.device | str = "cpu") -> "Assistant":
        """The model in the Hugging Face folder `path`, or the one that an adapter there makes of its base.

        `template` names a chat template, built in or from the TOML file `templates`; empty, the folder decides. Raises
        UserError for broken folders and an unknown template.
        """
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such folder; name a Hugging Face folder, such as runs/my/final")
        has_tokenizer = (Path(path) / "tokenizer.json").exists() or not is_adapter(path)
        tokenizer = Tokenizer(path if has_tokenizer else PeftFolder(path).base_folder())
        chosen = choose_template(template, load_templates(templates or None), tokenizer, option="--template")
        renderer = Renderer(chosen, tokenizer)
        return cls(from_pretrained(path, dtype=dtype, device=device), renderer, Path(path).resolve().name)

    @cached_property
    def decoder(self) -> CachedDecoder:
        """The network, prepared to continue a single text fast."""
        return CachedDecoder(self.model, packed=True)

    def answer(self, conversations: Sequence[tuple[Turn, ...]], *, max_new_tokens: int = 512,
               sampling: Sampling = GREEDY) -> list[str]:
        """The model's next turn in each conversation. Raises UserError for one that fills the model's context."""
        prompts = [self.renderer.prompt(turns) for turns in conversations]
        context = self.model.config.max_position_embeddings
        for turns, prompt in zip(conversations, prompts, strict=True):
            if len(prompt) >= context:
                raise UserError(f"{SHORT.repr(turns[-1].content)}: {len(prompt):,} tokens with all turns before it, "
                                f"but the model's context has {context:,}; shorten the question, or the answers before "
                                "it with --max-new-tokens")
        answers = generate(self.model, prompts, max_new_tokens=max_new_tokens, stop_ids=self.renderer.stop_ids(),
                           sampling=sampling)
        return [self.renderer.tokenizer.decode(ids) for ids in answers]

    def tokens(self, turns: tuple[Turn, ...], *, max_new_tokens: int = 512,
               sampling: Sampling = GREEDY) -> Iterator[int]:
        """The tokens of the model's next turn, as they are generated."""
        found = stream(self.decoder, [self.renderer.prompt(turns)], max_new_tokens=max_new_tokens,
                       stop_ids=self.renderer.stop_ids(), sampling=sampling)
        return (token for _, token in found)
