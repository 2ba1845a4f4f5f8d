"""train.py with a fault planted in one rank: `planted.py FAULT RANK STEP [the arguments of train.py]`.

    nan     the loss of the rank's first micro-batch of the step is not a number
    raise   the rank fails with a bug in the forward pass
    disk    the rank's disk is full when it writes its part of the first checkpoint after the step
    hang    the rank never comes back from the forward pass
    deaf    the rank fails with a bug, and rank 0 is stuck where it does not notice
    slow    the rank takes three seconds more to complete a checkpoint from the step on
    die     the rank is killed in the middle of the forward pass
    long    the rank takes five seconds more for each batch of an evaluation from the step on

After a restart by torchrun nothing is planted.
"""

import os
import signal
import sys
import time

from minisft.data.batches import steps
from minisft.runs import lifecycle
from minisft.training import checkpoint, loop
from minisft.training.parallel import launched_rank


def main(argv: list[str]) -> int:
    fault, rank, at = argv[0], int(argv[1]), int(argv[2])
    current, forward = 0, loop.batch_loss
    check, save_file, write_durably = lifecycle.Preemption.check, checkpoint.save_file, checkpoint._write_durably

    def watched(*args, **kwargs):
        nonlocal current
        for step in steps(*args, **kwargs):
            current = step.index + 1
            yield step

    def planted_forward(*args, **options):
        nonlocal current
        loss = forward(*args, **options)
        if current != at or fault in ("disk", "slow", "long"):
            return loss
        current = 0  # once a step
        if fault == "raise":
            raise RuntimeError("planted bug")
        if fault == "hang" or (fault == "deaf" and launched_rank()[0] == 0):
            time.sleep(3600)
        if fault == "deaf":
            raise RuntimeError("planted bug")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss * float("nan") if fault == "nan" else loss

    def is_due(file):
        return checkpoint.step_of(file.parent.with_suffix("")) >= at

    def full_disk(tensors, file):
        if is_due(file):
            raise OSError(28, "No space left on device")
        save_file(tensors, file)

    def slow_disk(file, content):
        if file.name == "manifest.json" and is_due(file):
            time.sleep(3)
        write_durably(file, content)

    def long_check(preemption, device):
        time.sleep(5 * (current >= at))
        check(preemption, device)

    if (launched_rank()[0] == rank or fault == "deaf") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        loop.steps, loop.batch_loss = watched, planted_forward
        if fault == "long":
            lifecycle.Preemption.check = long_check
        if fault == "disk":
            checkpoint.save_file = full_disk
        if fault == "slow":
            checkpoint._write_durably = slow_disk
    return lifecycle.main(argv[3:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
