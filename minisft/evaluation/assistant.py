"""A model folder that can be talked to: network, tokenizer and chat template together."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minisft.data.chat import Renderer
from minisft.data.formats import Turn
from minisft.data.jinja import recognize
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.evaluation.generate import generate
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
        home = path  # of the tokenizer
        if is_adapter(path) and not (Path(path) / "tokenizer.json").exists():
            home = PeftFolder(path).base
        tokenizer, known = Tokenizer(home), load_templates(templates or None)
        default_system = None
        if not template:
            if (found := recognize(tokenizer.chat_template)) is None:
                raise UserError(f"{path}: does not say which chat template the model uses; choose with --template: "
                                f"{', '.join(known)}; or write your own and name its file with --templates")
            template, default_system = found
        elif template not in known:
            raise UserError(f"--template: no template is called {template!r}; choose from {', '.join(known)}")
        chosen = replace(known[template], default_system=default_system) if default_system else known[template]
        return cls(Llama.from_pretrained(path, dtype=dtype, device=device), Renderer(chosen, tokenizer),
                   Path(path).resolve().name)

    def answer(self, conversations: list[tuple[Turn, ...]], *, max_new_tokens: int = 512) -> list[str]:
        """The model's next turn in each conversation, greedily."""
        prompts = [self.renderer.prompt(turns) for turns in conversations]
        answers = generate(self.model, prompts, max_new_tokens=max_new_tokens, stop_ids=self.renderer.stop_ids())
        return [self.renderer.tokenizer.decode(ids) for ids in answers]
