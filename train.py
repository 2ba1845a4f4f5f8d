"""Fine-tune a Llama-3: `torchrun [--nproc-per-node N] train.py [RECIPE] [--section.key value ...]`.

The same as `minisft train` and `torchrun -m minisft train` where minisft is installed: minisft/cli/train_command.py.
`python train.py --help` lists every key. The loop itself is in minisft/training/loop.py.
"""

import sys

from minisft.cli.train_command import run

if __name__ == "__main__":
    run(sys.argv[1:])
