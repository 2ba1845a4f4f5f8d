"""`minisft convert`: a model folder into another one, in Hugging Face's layout."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

from minisft.errors import PATH, UserError, printable
from minisft.export.provenance import FILE
from minisft.lora.adapters import PeftFolder, is_adapter
from minisft.model.llama import DTYPES
from minisft.pretrained import from_pretrained, save_pretrained

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def run(options: Namespace) -> None:
    """Write SOURCE as TARGET, which appears in one rename when it is complete."""
    source, target, dtype = options.source, options.target.resolve(), DTYPES[options.dtype]
    _check(options, target, adapter=is_adapter(source))
    partial = target.with_name(target.name + ".tmp")
    if partial.exists():
        raise UserError(f"{partial}: was left by a conversion that was killed; delete it")
    model = from_pretrained(source, dtype=dtype, format=options.format, base=options.base)
    base = PeftFolder(source).base_folder(options.base) if options.merge else source
    whose = source if (source / "tokenizer.json").exists() else base  # all of one: another's template would win
    files = [*(whose / name for name in TOKENIZER), *(folder / "generation_config.json" for folder in (base, source)),
             source / FILE]  # the record is only SOURCE's own
    try:
        save_pretrained(model, partial, dtype=dtype)
        for file in filter(Path.is_file, files):
            shutil.copyfile(file, partial / file.name)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    numbers = sum(parameter.numel() for parameter in model.parameters())
    lacks = "" if (target / "tokenizer.json").exists() else "; it has no tokenizer.json, copy one there"
    print(f"{printable(target, PATH)}: {numbers:,} parameters in {options.dtype}{lacks}")


def _check(options: Namespace, target: Path, *, adapter: bool) -> None:
    """Raise UserError if the options do not suit SOURCE, an `adapter` or a model, or TARGET cannot be written."""
    source = options.source
    if adapter and not options.merge:
        raise UserError(f"{source}: holds an adapter; add --merge")
    if options.merge and not adapter:
        model = next((file.name for file in source.glob("model*.safetensors*")), "")
        raise UserError(f"{source}: " + (
            f"holds a model beside its adapter ({printable(model)}); leave out --merge, or move one of the two away"
            if (source / "adapter_config.json").exists() else
            "holds no adapter (it has no adapter_config.json); leave out --merge"))
    if options.base and not options.merge:
        raise UserError("--base: names the base model of an adapter, so it needs --merge")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an empty folder; choose another target")
    if options.target.is_symlink() or target in (here := Path.cwd(), *here.parents):
        raise UserError(f"{target}: is a link, the current folder, or a folder around it; name a new folder")
