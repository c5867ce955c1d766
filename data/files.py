"""Files that appear whole or not at all, checkpoints that are never unpickled, and errors that a user can act on."""
import argparse
import contextlib
import csv
import glob
import math
import os
import pickle
import signal
import sys
import zipfile

import torch

FORMAT = 1  # of every file that a stage hands to the next one


class InputError(Exception):
    """Something given by the user is wrong. The message says what, where, and how to mend it, in one line."""


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviations, and errors of one line."""

    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" and "(default: False)" tell a reader nothing
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(low, high=math.inf, kind=int):
    """argparse type: a number of a kind in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses NaN
            raise argparse.ArgumentTypeError(f"{text} is not in {low} to {high}" if high < math.inf else f"{text} is not at least {low}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def numbers(text):
    """argparse type: whole numbers of at least 1, joined by commas, in order."""
    return sorted({number(1)(part) for part in text.split(",")})


def grid(text):
    """argparse type: one whole number of at least 1, or three joined by commas. -> a tuple"""
    sizes = tuple(number(1)(part) for part in text.split(","))
    if len(sizes) not in (1, 3):
        raise argparse.ArgumentTypeError(f"{text} is neither one number nor three, as in 80,112,112")
    return sizes


grid.__name__ = "size"
SHARE = number(0, 1, float)
SEED = number(0, 2 ** 40)


def cli(main):
    """Runs a script's main(): wrong input ends in one line on standard error and exit code 2, Ctrl-C in 130, SIGTERM in 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files are removed
    try:
        main()
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:
        sys.exit(_complain(error, 2))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", 130))


def _complain(error, code):
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`; it takes the place of `path` if the block ends well, else it is removed."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def save_checkpoint(path, stage, **state):
    """Writes a checkpoint of `stage` ("weak", "qp", "ssl"): plain containers, numbers and tensors only."""
    with replacing(path) as temporary:
        torch.save(dict(format=FORMAT, stage=stage, torch=str(torch.__version__), **state), temporary)


def load_checkpoint(path, stage):
    """The dict that save_checkpoint wrote, on the CPU. InputError if it is missing, damaged or of another stage."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}); make it again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this project (format {FORMAT})")
    if state["stage"] != stage:
        raise InputError(f"{path}: a checkpoint of stage '{state['stage']}', but '{stage}' is needed here")
    return state


class Log:
    """A training run's records: a row of OUT/log.csv, TensorBoard scalars, and a line on the screen for each."""

    def __init__(self, out, columns, after=0, writes=True):
        """after: the step that a resumed run goes on from; later rows of the interrupted run are dropped. 0 removes a former run.
        writes: False for all but one of several processes, which keep no records."""
        self.writes = writes
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter
        if not after:
            for path in [p for name in ("*.pt", "log.csv", "events.*") for p in glob.glob(os.path.join(glob.escape(out), name))]:
                os.remove(path)
        self.path, self.columns, rows = os.path.join(out, "log.csv"), columns, []
        if after and os.path.isfile(self.path):
            with open(self.path, newline="") as f:
                rows = [row for row in csv.DictReader(f) if int(row["step"]) <= after]
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(rows)
        self.events = SummaryWriter(out, purge_step=after + 1 if after else None)

    def write(self, step, **values):
        """One record; columns that are not given stay empty."""
        if not self.writes:
            return
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()}
        with open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow({"step": step, **shown})
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        print(f"step {step}  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()), flush=True)


def start_run(stage, args, data, free=()):
    """Looks at OUT/last.pt before a training run. -> the state to resume from, or of a run that is finished (state["finished"]), or None for a
    fresh start

    data: what describes the data now. InputError if OUT holds an unfinished run and neither --resume nor --overwrite is given, or a run that
    was started with other data or options (those named in `free` may differ).
    """
    last, found = os.path.join(args.out, "last.pt"), glob.glob(os.path.join(glob.escape(args.out), "*.pt"))
    if args.resume and args.overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it: choose one")
    if args.overwrite or not found or (args.resume and not os.path.isfile(last)):  # killed before its first last.pt, a run begins again
        return None
    if not os.path.isfile(last):
        raise InputError(f"{args.out}: holds a run, but no last.pt; begin again with --resume or --overwrite, or choose another --out")
    state = load_checkpoint(last, stage)
    for key, value in vars(args).items():
        if key not in {"resume", "overwrite", "out", "data", "device", *free} and state["args"].get(key) != value:
            raise InputError(f"{last}: was started with --{key.replace('_', '-')} {state['args'].get(key)}, not {value}; "
                             "replace it with --overwrite, or choose another --out")
    for key, value in data.items():
        if state["data"][key] != value:
            raise InputError(f"{last}: was started on other data ({key} {state['data'][key]}, not {value})")
    if not args.resume and not state["finished"]:
        raise InputError(f"{args.out}: holds an unfinished run; go on with --resume, replace it with --overwrite, or choose another --out")
    return state
