"""Files that appear whole or not at all, checkpoints that are never unpickled, and errors that a user can act on."""
import argparse
import contextlib
import csv
import glob
import math
import os
import signal
import sys
import tempfile
import warnings
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
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; --help shows the options\n")


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


def folder(text):
    """argparse type: a folder that can be written to, or made."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a folder")
    there = os.path.abspath(text)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written to ({error.strerror or error}: {there}); choose another") from None
    return text


def picture(text):
    """argparse type: a file in a folder that can be written to, or made."""
    folder(os.path.dirname(text) or ".")
    if not text or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: a folder, not a file; name a picture in it")
    return text


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


# What the readers of a checkpoint count on, by its stage. "args/size": the entry "size" of the dict "args"
MODEL = {"args": dict, "model/name": str, "model/channels": int, "model/classes": int, "model/dims": int,
         "data/name": str, "data/classes": list, "data/channels": int, "data/dims": int, "data/checksum": (int, str), "labeled": list}
HOLDS = {
    "ssl": MODEL | {"nets": list, "teacher": dict, "step": int, "args/size": (int, tuple), "args/seed": int, "args/method": str, "args/weight": str,
                    "args/weight_level": str, "args/qar": (int, float), "args/labeled": str},
    "qp": MODEL | {"weights": dict, "epoch": int, "args/size": (int, tuple, type(None)), "best/epoch": int},
    "weak": {"weights": dict}}
RESUMES = {"ssl": {"finished": bool, "optimizer": dict, "scaler": dict, "best/dice": float, "best/step": int},
           "qp": {"finished": bool, "optimizer": dict, "scaler": dict, "schedule": dict, "net": dict, "best/error": float}}  # last.pt
PLAIN = (str, int, float, bool, type(None), torch.dtype)


def load_checkpoint(path, stage):
    """The dict that save_checkpoint wrote, on the CPU. InputError if it is missing, damaged, of another stage, or not what HOLDS says."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'a folder, not a checkpoint' if os.path.isdir(path) else 'no such checkpoint'}; give the .pt of a finished stage")
    try:
        with zipfile.ZipFile(path) as archive:  # older formats of torch.load are not even looked at
            if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()) or (wrong := archive.testzip()):
                raise zipfile.BadZipFile("compressed, or of a wrong checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the file holds, it is the file that is wrong
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}); make it again") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int) or state["format"] != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this project (format {FORMAT}); make it again")
    if state.get("stage") != stage:
        raise InputError(f"{path}: a checkpoint of stage {state.get('stage')!a:.40}, but '{stage}' is needed here; give one of that stage")
    _check_plain(path, state)
    for name, kind in (HOLDS[stage] | (RESUMES.get(stage, {}) if os.path.basename(path) == "last.pt" else {})).items():
        value = state
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{path}: {name} is {'missing' if value is None else 'of type ' + type(value).__name__}; make the checkpoint again")
    return state


def _check_plain(path, value, where="the checkpoint", depth=0):
    """InputError unless a value is made of dicts, lists, tuples, numbers, texts and tensors that hold all that they show."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"{path}: {where} is no plain tensor of {tuple(value.shape)}; make the checkpoint again")
    elif isinstance(value, (dict, list, tuple)) and depth < 20:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(path, key, f"a key of {where}", depth + 1)
            _check_plain(path, part, f"{where}[{ascii(key)[:60]}]", depth + 1)
    elif not isinstance(value, PLAIN):
        raise InputError(f"{path}: {where} is of type {type(value).__name__}, or nested too deep; make the checkpoint again")


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
