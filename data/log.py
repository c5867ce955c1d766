"""log.csv and TensorBoard events of a run."""

import contextlib
import csv
import glob
import os
import sys

from tqdm import tqdm

from data import files


class Log:
    """A training run's records: a row of OUT/log.csv, TensorBoard scalars and pictures, and a line of a table on the screen for each."""

    def __init__(self, out, columns, after=0, *, writes=True, fresh=True, shown=()):
        """after: the step that a resumed run goes on from; later rows of the interrupted run are dropped.
        fresh: a former run is removed. writes: False for all but one of several processes, which keep no records.
        shown: columns of the screen's table, which should fit into 80 characters; default: all."""
        self.writes, self.shown, self.lines, self.noted = writes, shown or columns, 0, False
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.lock = files.claim(out)
        if fresh:
            for path in [
                p
                for name in ("last.pt", "*.pt", "log.csv", "events.*")
                for p in glob.glob(os.path.join(glob.escape(out), name))
            ]:
                with contextlib.suppress(
                    FileNotFoundError
                ):  # last.pt, the first to go, is one of *.pt
                    os.remove(path)
        self.path, self.columns, rows = os.path.join(out, "log.csv"), columns, []
        if after and os.path.isfile(self.path):
            with open(self.path, newline="", encoding="utf-8") as f:
                rows = [
                    row
                    for row in csv.DictReader(f)
                    if None not in row.values() and int(row["step"]) <= after
                ]  # the last may be cut short
        with files.replacing(self.path) as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        self.events = SummaryWriter(out, purge_step=after + 1 if after else None)

    def write(self, step, pictures=(), note="", **values):
        """One record; columns that are not given stay empty. pictures: (name, (H, W, 3) uint8), ... for TensorBoard.
        note: a line, in the column of this name; on the screen it stands where the row before had none."""
        if not self.writes:
            return
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()}
        with files.room_for(self.path):
            with open(self.path, "a", newline="", encoding="utf-8") as f:
                csv.DictWriter(f, self.columns).writerow(
                    {"step": step, **shown, **({"note": note} if note else {})}
                )
            files.sync(self.path)
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            for name, picture in pictures:
                self.events.add_image(name, picture, step, dataformats="HWC")
            self.events.flush()
        row = {"step": step, **values}
        line = lambda cell: "".join(f"{cell(name):>{max(6, len(name)) + 2}}" for name in self.shown)
        if self.lines % 25 == 0:
            tqdm.write(line(lambda name: name))
        tqdm.write(
            line(lambda name: short(row[name]) if name in row else "-")
        )  # past a bar, if there is one
        if note and not self.noted:
            tqdm.write(note)
        sys.stdout.flush()
        self.lines, self.noted = self.lines + 1, bool(note)


def short(value):
    """A number in at most seven characters."""
    if isinstance(value, int):
        return str(value)
    if 1e-3 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.4g}" if value == 0 or 10 <= abs(value) < 1e4 else f"{value:.0e}"
