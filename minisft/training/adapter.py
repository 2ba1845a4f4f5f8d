"""The trained adapter as a folder that `peft` loads, with the tokenizer and the end of an answer beside it.

Together with the base model it is what `final/` is, in a hundredth of the bytes. With a base in NF4 there is a
difference: `final/` is merged into the dequantised base, which is what the adapter was trained beside, while whoever
loads the adapter onto the base in bf16 adds it to something slightly else.
"""

from pathlib import Path

from minisft.config import LoraConfig
from minisft.data.chat import Renderer
from minisft.lora import lora, peft
from minisft.model import weights
from minisft.model.llama import Llama
from minisft.training.export import appearing, as_json, companions, write


def export_adapter(model: Llama, settings: LoraConfig, renderer: Renderer, folder: Path, *, base: str,
                   leads: bool = True) -> None:
    """Write `folder`, an adapter of the model in folder `base`. All ranks call it, the leading one writes."""
    tensors = dict(lora.tensors(model))
    with appearing(folder, leads=leads) as partial:
        if leads:
            weights.write(tensors, partial / "adapter_model.safetensors")
            described = as_json(peft.settings(settings, model.config, base=base))
            write(partial, {"adapter_config.json": described, **companions(renderer, model.config)})
