"""A run's log as TensorBoard's event files, made afterwards: training itself does not know TensorBoard."""

from pathlib import Path

from minisft.errors import PATH, UserError, printable
from minisft.reports.logged_run import LoggedRun, is_number


def write_events(run: LoggedRun, folder: Path) -> int:
    """Write every number of every record, as `train/loss` or `eval/NAME/loss`, and the answers as text, into `folder`.

    Returns the number of values. Raises UserError without tensorboard, and if `folder` already holds event files.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("event files need tensorboard, which is not installed; pip install -e '.[tensorboard]'"
                        ) from None
    if printable(folder, PATH) != str(folder):
        raise UserError(f"{folder}: TensorBoard does not accept this name; choose another folder")
    if any(folder.glob("events.out.tfevents.*")):
        raise UserError(f"{folder}: already holds event files, and TensorBoard would show both; delete them, or choose "
                        "another folder")
    logs = {"train": run.train, **{f"eval/{name}": records for name, records in run.evals.items()}}
    values = [(f"{prefix}/{name}", value, record["step"]) for prefix, records in logs.items() for record in records
              for name, value in (*record.items(), *((f"sources/{k}", v) for k, v in record.get("sources", {}).items()))
              if name != "step" and is_number(value)]
    with SummaryWriter(str(folder)) as writer:
        for tag, value, step in values:
            writer.add_scalar(tag, value, step)
        for number, sample in enumerate(run.samples):
            text = "\n\n".join(f"**{key}**\n\n{sample.get(key, '')}" for key in ("prompt", "answer", "reference"))
            writer.add_text(f"sample/{sample.get('name')}/{number}", text, sample["step"])
    return len(values)
