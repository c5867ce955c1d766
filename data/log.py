"""log.csv and TensorBoard events of a run."""

import contextlib
import csv
import os
import sys

from tqdm import tqdm

from data import files


class Log:
    """A training run's records.

    Each is a row of OUT/log.csv, TensorBoard scalars and pictures, and a line of a table on the
    screen.
    """

    def __init__(self, out, columns, after=0, *, writes=True, former=(), shown=(), counts="step"):
        """columns: of log.csv, "step" first.

        after: the step that a resumed run goes on from; later rows of it are dropped.
        writes: False for all but one of several processes, which keep no records.
        former: files of a former run, which are removed, in this order.
        shown: columns of the screen's table, which should fit into 80 characters; default: all.
        counts: what the table calls the column "step".
        """
        self.writes = writes
        self.columns = columns
        self.shown = shown or columns
        self.counts = counts
        self.lines = 0  # on the screen
        self.noted = False  # whether the last of them had a note
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.lock = files.claim(out)
        for path in former:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        self.path = os.path.join(out, "log.csv")
        rows = rows_until(self.path, after) if after and os.path.isfile(self.path) else []
        with files.replacing(self.path) as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        self.events = SummaryWriter(out, purge_step=after + 1 if after else None)

    def write(self, step, pictures=(), note="", **values):
        """One record. Columns that are not given stay empty.

        pictures: (name, (H, W, 3) uint8), ... for TensorBoard. note: a line, in the column of this
        name; on the screen it stands where the row before had none.
        """
        if not self.writes:
            return
        cells = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()}
        cells |= {"step": step}
        if note:
            cells["note"] = note
        with files.room_for(self.path):
            with open(self.path, "a", newline="", encoding="utf-8") as f:
                csv.DictWriter(f, self.columns).writerow(cells)
            files.sync(self.path)
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            for name, picture in pictures:
                self.events.add_image(name, picture, step, dataformats="HWC")
            self.events.flush()
        self._show({"step": step, **values}, note)

    def _show(self, row, note):
        """A line on the screen, past a bar, if there is one; the names of its columns at times."""
        if self.lines % 25 == 0:
            heads = {name: name for name in self.shown} | {"step": self.counts}
            tqdm.write(self._line(heads))
        tqdm.write(self._line({name: short(value) for name, value in row.items()}))
        if note and not self.noted:
            tqdm.write(note)
        sys.stdout.flush()
        self.lines += 1
        self.noted = bool(note)

    def _line(self, cells):
        """{column: text} -> a line; "-" where a column has none."""
        widths = {name: max(6, len(name)) + 2 for name in self.shown}
        return "".join(f"{cells.get(name, '-'):>{width}}" for name, width in widths.items())


def rows_until(path, step):
    """The rows of a log.csv up to a step. The last row may be cut short, and is left out then."""
    with open(path, newline="", encoding="utf-8") as f:
        whole = [row for row in csv.DictReader(f) if None not in row.values()]
    return [row for row in whole if int(row["step"]) <= step]


def short(value):
    """A number in at most seven characters."""
    if isinstance(value, int):
        return str(value)
    if 1e-3 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.4g}" if value == 0 or 10 <= abs(value) < 1e4 else f"{value:.0e}"
