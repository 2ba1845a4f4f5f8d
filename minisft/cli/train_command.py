"""`minisft train [RECIPE] [--section.key value ...]`, `torchrun -m minisft train ...` and train.py: a training run.

RECIPE is a TOML file or the name of a shipped recipe. Without one, the demo runs; with `--model.*` or `--data.*` and no
recipe, all other keys have their defaults. `minisft train --help` lists every key.
"""

import os
import sys
import traceback
from typing import NoReturn

from minisft.config_io import default_recipe, help_text
from minisft.errors import EXIT_BUG, EXIT_INTERRUPTED
from minisft.streams import secure


def main(argv: list[str]) -> int:
    """Run a recipe; the demo is two of them and a comparison. Returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    # Without it, tensors whose sizes depend on the documents (the trained tokens' logits) leave gaps in GPU memory that
    # no other tensor fits. torch reads the setting when it is loaded; the user's own setting wins.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # OpenMP's threads spin for milliseconds while they wait for one whose core another process has. Read as above.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if argv[:1] == ["demo"] or not argv or (argv[0].startswith("--") and default_recipe(argv)):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # its model is so small that threads would mostly wait
        from minisft.demo.demo_run import main as demo  # imported late: importing torch takes seconds

        return demo(argv[1:] if argv[:1] == ["demo"] else argv)
    from minisft.runs.lifecycle import main as train

    return train(argv)


def run(argv: list[str]) -> NoReturn:
    """Run `main` and end this process with its exit code."""
    secure("stdout", "stderr")
    try:
        code = main(argv)
    except KeyboardInterrupt:  # while torch is imported
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        code = EXIT_BUG
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a torch thread that outlives the interpreter can abort a process whose work is done, and after a
    # failure NCCL would wait there for ranks that never come.
    os._exit(code)
