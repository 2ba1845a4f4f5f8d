"""Change one line of docs/one_file.py, and see: `change.py OLD NEW [--steps 40] [--seq-len 2048] ...`.

OLD must stand in the file exactly once; the changed copy is runs/change/changed.py. Both files then train the same
small model, of random weights and with single bytes as tokens, on ten conversations; the options are one_file.py's.
Printed are the losses that each run reports and, last, the loss on the answers of the model that it wrote, computed by
the file as it is: what the change has done to the model, whatever the run says of itself.
"""

import io
import json
import runpy
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ONE_FILE = Path(__file__).resolve().parents[1] / "one_file.py"
DATA = Path(__file__).with_name("ten_conversations.jsonl")
SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CONFIG = {"model_type": "llama", "vocab_size": 256 + len(SPECIAL), "hidden_size": 64, "intermediate_size": 160,
          "num_hidden_layers": 2, "num_attention_heads": 4}
OPTIONS = {"--steps": "40", "--lr": "3e-3", "--warmup": "4", "--packs": "64", "--precision": "fp32"}


def changed(old: str, new: str, text: str) -> str:
    """Replace `old`, which must be in `text` exactly once."""
    if (times := text.count(old)) != 1:
        sys.exit(f"{old!r} stands {times} times in {ONE_FILE.name}; write a part of it that stands there once")
    return text.replace(old, new)


def write_model(folder: Path) -> None:
    """Write a Llama of random weights (variance 1 / inputs) whose tokens are bytes."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    one_file, random = runpy.run_path(str(ONE_FILE)), torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=random) * shape[-1] ** -0.5 if len(shape) == 2 else torch.ones(shape)
               for name, parameter in one_file["Llama"](one_file["read_config"](folder)).named_parameters()
               for shape in [parameter.shape]}, folder / "model.safetensors")


def losses(program: Path, model: Path, out: Path, options: dict[str, str]) -> list[float]:
    """Run one of the two files, in this process; returns the losses that it prints."""
    argv, printed = sys.argv, io.StringIO()
    sys.argv = [str(program), str(model), str(DATA), "--out", str(out), *(x for pair in options.items() for x in pair)]
    try:
        with redirect_stdout(printed):
            runpy.run_path(str(program), run_name="__main__")
    finally:
        sys.argv = argv
    return [json.loads(line)["loss"] for line in printed.getvalue().splitlines()]


def trained(program: Path, folder: Path, options: dict[str, str]) -> tuple[list[float], float]:
    """Train `folder`/model with `program`; returns the loss of each step, and of the answers at the end."""
    out = folder / program.stem
    steps = losses(program, folder / "model", out, options)
    [answers] = losses(ONE_FILE, out, folder / "read", options | {"--steps": "1"})
    return steps, answers


def main(old: str, new: str, *given: str) -> None:
    folder, options = Path("runs/change"), OPTIONS | dict(zip(given[::2], given[1::2], strict=True))
    program, text = folder / "changed.py", changed(old, new, ONE_FILE.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder / "model")
    program.write_text(text, encoding="utf-8")
    print(f"{'':<12}  step 1  step 2  step {options['--steps']}  answers, read by one_file.py")
    for file in (ONE_FILE, program):
        steps, answers = trained(file, folder, options)
        print(f"{file.name:<12}  {steps[0]:6.3f}  {steps[1]:6.3f}  {steps[-1]:7.3f}  {answers:7.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {__doc__}")
    main(*sys.argv[1:])
