"""Fine-tune a Llama-3: `torchrun [--nproc-per-node N] train.py [RECIPE] [--section.key value ...]`.

RECIPE is a TOML file or the name of a shipped recipe; without one the demo runs. `python train.py --help` lists every
key. The loop itself is in minisft/training/trainer.py.
"""

import sys

from minisft.training.trainer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
