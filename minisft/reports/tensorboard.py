"""A run's log as TensorBoard's event files, after the fact: training itself knows nothing of TensorBoard."""

from pathlib import Path

from minisft.errors import PATH, UserError, printable
from minisft.reports.runs import Run
from minisft.reports.shapes import is_number


def write_events(run: Run, folder: Path) -> int:
    """Every number of every record, as `train/loss` or `eval/NAME/loss`, and the answers as text, into `folder`.

    Returns the number of values. Raises UserError without tensorboard, and where `folder` holds events already.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("event files need tensorboard, which is not installed; pip install -e '.[tensorboard]'"
                        ) from None
    if printable(folder, PATH) != str(folder):
        raise UserError(f"{folder}: TensorBoard takes no such name; choose another folder")
    if any(folder.glob("events.out.tfevents.*")):
        raise UserError(f"{folder}: holds event files already, and TensorBoard would show both; delete them, or choose "
                        "another folder")
    values = 0
    with SummaryWriter(str(folder)) as writer:
        for prefix, records in {"train": run.train, **{f"eval/{name}": evals.records
                                                      for name, evals in run.evals.items()}}.items():
            for record in records:
                for name, value in record.items():
                    if name != "step" and is_number(value):
                        writer.add_scalar(f"{prefix}/{name}", value, record["step"])
                        values += 1
                for source, tokens in record.get("sources", {}).items():
                    writer.add_scalar(f"{prefix}/sources/{source}", tokens, record["step"])
                    values += 1
        for number, sample in enumerate(run.samples):
            text = "\n\n".join(f"**{key}**\n\n{sample.get(key, '')}" for key in ("prompt", "answer", "reference"))
            writer.add_text(f"sample/{sample.get('name')}/{number}", text, sample["step"])
    return values
