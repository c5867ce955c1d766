"""Files that appear whole or not at all, checkpoints that are never unpickled, and errors that a user can act on."""

import argparse
import codecs
import contextlib
import csv
import errno
import functools
import glob
import io
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

FORMAT = 1  # of every file that a stage hands to the next one
TRAINING = 2  # raised when a training step computes something else; a run is resumed only under the number that it began with


class InputError(Exception):
    """Something given by the user is wrong. The message says what, where, and how to mend it, in one line."""


class DiskFull(InputError):
    """A file could not be written for lack of room. What was there before is untouched."""


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviations, and errors of one line."""

    def __init__(self, doc, **kwargs):
        self.group = None
        super().__init__(description=doc, allow_abbrev=False, formatter_class=_Help, **kwargs)

    def section(self, title):
        """The options that are added from here on stand under a title of their own in --help."""
        self.group = self.add_argument_group(title)

    def add_argument(self, *args, **kwargs):
        return (super() if self.group is None else self.group).add_argument(*args, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; --help shows the options\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(
        self, action
    ):  # "(default: None)" and "(default: False)" tell a reader nothing
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return (
            f"{action.help} (default: {action.default:.3g})"
            if isinstance(action.default, float)
            else super()._get_help_string(action)
        )


def number(low, high=math.inf, kind=int):
    """argparse type: a number of a kind in [low, high]."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses NaN
            raise argparse.ArgumentTypeError(
                f"{text} is not in {low} to {high}"
                if high < math.inf
                else f"{text} is not at least {low}"
            )
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
        raise argparse.ArgumentTypeError(
            f"{text} is neither one number nor three, as in 80,112,112"
        )
    return sizes


grid.__name__ = "size"


def folder(text):
    """argparse type: a folder that can be written to, or made."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a folder")
    if any("\udc80" <= c <= "\udcff" for c in text):  # what Python makes of other bytes
        raise argparse.ArgumentTypeError(f"{ascii(text)}: is not UTF-8; choose another")
    there = os.path.abspath(text)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text}: cannot be written to ({error.strerror or error}: {there}); choose another"
        ) from None
    return text


def picture(text):
    """argparse type: a file in a folder that can be written to, or made."""
    folder(os.path.dirname(text) or ".")
    if not text or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: a folder, not a file; name a picture in it")
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text}: pictures are PNG files; name it .png")
    return text


def flip_axes(text):
    """argparse type: letters of the axes D, H, W, joined by commas, or none. -> them, in order"""
    names = text.replace(" ", "").upper().split(",")
    if text.strip().lower() == "none":
        return "none"
    if len(set(names)) < len(names) or not set(names) <= set("DHW"):
        raise argparse.ArgumentTypeError(f"{text}: neither none nor axes of D, H, W, as in H,W")
    return ",".join(sorted(names))


SHARE = number(0, 1, float)
SEED = number(0, 2**40)


def seed_of(seed, step, stream):
    """The seed of one step's random numbers of one kind (stream), from the seed of everything: a resumed run draws what it would have drawn."""
    return seed * 1_000_003 + step + stream * 2**41


# ---------------------------------------------------------------------------------------------------- how a script ends


def cli(main):
    """Runs a script's main(): wrong input ends in one line on standard error and exit code 2, Ctrl-C in 130, SIGTERM in 143."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # unwinds, so that temporary files are removed
    threading.excepthook = lambda failed: (
        None if issubclass(failed.exc_type, OSError) else threading.__excepthook__(failed)
    )  # TensorBoard's tells us too
    for hook in (
        "excepthook",
        "unraisablehook",
    ):  # h5py's words of each part of a file that it cannot write; DiskFull tells
        setattr(sys, hook, functools.partial(_unless_h5py, getattr(sys, f"__{hook}__")))
    for stream in (sys.stdout, sys.stderr):  # a console may lack characters of tables and names
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except DiskFull as error:
        _complain(error, 2)
        sys.stdout.flush()
        os._exit(2)  # at an ordinary exit, HDF5 tries once more to write, and crashes
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:
        sys.exit(_complain(error, 2))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", 130))


def _unless_h5py(usual, *failed):
    if "decrement id ref count" not in str(failed[1] if len(failed) == 3 else failed[0].exc_value):
        usual(*failed)


def _complain(error, code):
    text = (
        f"{error.filename}: {error.strerror}"
        if isinstance(error, OSError) and error.filename
        else str(error)
    )
    line = "".join(
        c if c.isprintable() else "?" for c in " ".join(text.split())
    )  # file names may hold anything
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    return code


@contextlib.contextmanager
def postponed_signals():
    """In its block Ctrl-C and SIGTERM do not interrupt: `stop()` of `with postponed_signals() as stop` is 0 until one comes, then its exit code,
    so that the block can save and leave. Another one, a second or more later, interrupts as ever."""
    first = []  # exit code and time; batch systems and torchrun may send a signal twice at once
    usual = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }

    def note(number, _):
        if not first:
            first.extend((128 + number, time.monotonic()))
        elif time.monotonic() - first[1] > 1:
            signal.signal(number, usual[number])
            signal.raise_signal(number)

    try:
        for number in usual:
            signal.signal(number, note)
        yield lambda: first[0] if first else 0
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------- files

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of a file system


def errno_of(error):
    """The system's number for an error, 0 if it has none. HDF5 may tell it in its text alone."""
    if not isinstance(error, (OSError, RuntimeError)):
        return 0
    said = re.findall(r"errno = (\d+)", str(error))
    return getattr(error, "errno", None) or int((said or [0])[0])


def unreadable(path, error):
    """InputError for an error of the system, not of what a file holds; None for other errors."""
    number = errno_of(error)
    if number in (errno.EACCES, errno.EPERM):
        return InputError(
            f"{path}: not permitted to read it; ask its owner for permission, or choose another"
        )
    if number and number not in (errno.EINVAL, errno.EOVERFLOW):  # damage leads to wrong places
        return InputError(
            f"{path}: cannot be read ({os.strerror(number)}); try again, or copy it to another disk"
        )
    return None


def absent(path, what):
    """Why a path is none of a file, in words. what: a file, or what the file should be"""
    try:
        os.stat(path)
    except PermissionError:
        return "not permitted to look into its folder"
    except (OSError, ValueError):
        return f"no such {what}"
    return f"a folder, not a {what}" if os.path.isdir(path) else f"a device or pipe, not a {what}"


@contextlib.contextmanager
def room_for(path):
    """Where its block finds no room to write, it ends in DiskFull."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
    ) as error:  # h5py raises a RuntimeError when a file cannot be closed, and the number is in its text
        number = errno_of(error)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            f"{path}: cannot be written ({os.strerror(number)}); make room and run the same command again, with --resume if it "
            "has that option; what was there before is untouched"
        ) from None


def read_text(path):
    """A text file that a user made: UTF-8, or UTF-16 with its mark. InputError for other encodings."""
    with open(path, "rb") as f:
        raw = f.read()
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{path}: not a text file; save it as UTF-8 text")
    return text


def read_table(path, columns):
    """A CSV file with a header, separated by commas, semicolons or tabs. -> a dict for each row

    InputError if one of `columns` is missing or comes twice, if a row has none of their values, or
    if it has more cells than the header.
    """
    lines = read_text(path).splitlines()
    separator = max(",;\t", key=lines[0].count) if lines else ","
    rows = csv.DictReader(lines, delimiter=separator)
    names = [name.strip() for name in rows.fieldnames or []]
    rows.fieldnames = names
    for name in columns:
        if names.count(name) != 1:
            raise InputError(
                f"{path}: {names.count(name) or 'no'} column '{name}' (there are: "
                f"{', '.join(names) or 'none'}); its first line must name "
                f"{', '.join(columns)}, each once"
            )
    found = []
    try:
        for row in rows:
            if any(map(str.strip, row.pop(None, ()))):  # of cells beyond the header
                raise InputError(
                    f"{path}: line {rows.line_num} has more cells than the first line; mend it"
                )
            row = {name: (row[name] or "").strip() for name in names}
            if empty := [name for name in columns if not row[name]]:
                raise InputError(f"{path}: line {rows.line_num} has no '{empty[0]}'; fill it in")
            found.append(row)
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: {error}; mend it") from None
    return found


def read_lists(paths, name=str):
    """Text files that list cases, one on a line. -> {split: names}, without files that are missing

    paths: {split: Path}; name: what makes the name of a case from a line.
    InputError for a case that stands there twice.
    """
    found, seen = {}, {}
    for split, path in paths.items():
        if not path.is_file():
            continue
        found[split] = []
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            case = name(line.strip())
            if case in seen:
                raise InputError(
                    f"{path}: line {number} names '{case}', as does {seen[case]}; "
                    "remove one of the two"
                )
            seen[case] = f"line {number} of {path.name}"
            found[split].append(case)
    return found


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`; it takes the place of `path` if the block ends well, else it is removed."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.part")
    try:
        with room_for(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def sync(path):
    """Returns when a file, or the names in a folder, would outlast a power failure."""
    with contextlib.suppress(
        PermissionError
    ):  # of folders, where the system (Windows) does not open them
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def claim(out, *inside):
    """Makes a folder and takes it for this process, as long as what this returns is kept; removes what killed processes left half-written there
    and in its subfolders `inside`.

    InputError if another process has taken it. Where the file system has no locks, nobody is kept
    out.
    """
    os.makedirs(out, exist_ok=True)
    # Readers of a run that was just killed may hold it for seconds. No fallback to a file that
    # stands for a lock: that of a killed process would keep everybody out.
    lock = FileLock(
        os.path.join(out, ".lock"), timeout=10, is_singleton=True, fallback_to_soft=False
    )
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{out}: another process is writing to it; wait until it ends, or choose another --out"
        ) from None
    except (NotImplementedError, OSError) as error:  # a file system without locks
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
    for left in [
        path
        for part in ("", *inside)
        for path in glob.glob(os.path.join(glob.escape(out), part, ".*.[0-9]*.part"))
    ]:
        os.remove(left)
    return lock


def checksum(path):
    """CRC-32 of a file; None for no file."""
    if path is None:
        return None
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: {absent(path, 'file')}; give the file that an earlier stage wrote"
        )
    value = 0
    with open(path, "rb") as f:
        while block := f.read(2**22):
            value = zlib.crc32(block, value)
    return value


# ---------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, stage, **state):
    """Writes a checkpoint of `stage` ("weak", "qp", "ssl"): plain containers, numbers and tensors only."""
    with replacing(path) as temporary:
        try:
            torch.save(
                dict(
                    format=FORMAT,
                    training=TRAINING,
                    stage=stage,
                    torch=str(torch.__version__),
                    **state,
                ),
                temporary,
            )
        except RuntimeError as error:  # all that torch says of a failed write
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "") from None


# What the readers of a checkpoint count on, by its stage. "args/size": the entry "size" of the dict "args"
MODEL = {
    "args": dict,
    "model/name": str,
    "model/channels": int,
    "model/classes": int,
    "model/dims": int,
    "data/name": str,
    "data/classes": list,
    "data/channels": int,
    "data/dims": int,
    "data/checksum": (int, str),
    "labeled": list,
}
HOLDS = {
    "ssl": MODEL
    | {
        "nets": list,
        "teacher": dict,
        "step": int,
        "args/size": (int, tuple),
        "args/seed": int,
        "args/method": str,
        "args/weight": str,
        "args/weight_level": str,
        "args/qar": (int, float),
        "args/labeled": str,
    },
    "qp": MODEL
    | {"weights": dict, "epoch": int, "args/size": (int, tuple, type(None)), "best/epoch": int},
    "weak": {"weights": dict},
    "corrupt": {"args": dict, "data": dict, "fold": int, "inputs": dict, "finished": bool},
}
RESUMES = {  # last.pt
    "ssl": {
        "finished": bool,
        "optimizer": dict,
        "scaler": dict,
        "best/dice": float,
        "best/step": int,
        "inputs": dict,
        "parts": torch.Tensor,
        "seconds": float,
    },
    "qp": {
        "finished": bool,
        "optimizer": dict,
        "scaler": dict,
        "schedule": dict,
        "net": dict,
        "best/error": float,
        "inputs": dict,
        "losses": torch.Tensor,
        "seconds": float,
    },
}
PLAIN = (str, int, float, bool, type(None), torch.dtype)


def load_checkpoint(path, stage):
    """The dict that save_checkpoint wrote, on the CPU. InputError if it is missing, damaged, of another stage, or not what HOLDS says."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {absent(path, 'checkpoint')}; give the .pt of a finished stage")
    try:
        with zipfile.ZipFile(path) as archive:  # older formats of torch.load are not even looked at
            if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()) or (
                wrong := archive.testzip()
            ):
                raise zipfile.BadZipFile("compressed, or of a wrong checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the file holds, it is the file that is wrong
        if found := unreadable(path, error):
            raise found from None
        raise InputError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); make it again"
        ) from None
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("format"), int)
        or state["format"] != FORMAT
    ):
        raise InputError(
            f"{path}: not a checkpoint of this project (format {FORMAT}); make it again"
        )
    if state.get("stage") != stage:
        raise InputError(
            f"{path}: a checkpoint of stage {state.get('stage')!a:.40}, but '{stage}' is needed here; give one of that stage"
        )
    _check_plain(path, state)
    for name, kind in (
        HOLDS[stage] | (RESUMES.get(stage, {}) if os.path.basename(path) == "last.pt" else {})
    ).items():
        value = state
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"{path}: {name} is {'missing' if value is None else 'of type ' + type(value).__name__}; make the checkpoint again"
            )
    return state


def _check_plain(path, value, where="the checkpoint", depth=0):
    """InputError unless a value is made of dicts, lists, tuples, numbers, texts and tensors that hold all that they show."""
    if isinstance(value, torch.Tensor):
        if (
            value.layout != torch.strided
            or value.device.type != "cpu"
            or value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise InputError(
                f"{path}: {where} is no plain tensor of {tuple(value.shape)}; make the checkpoint again"
            )
    elif isinstance(value, (dict, list, tuple)) and depth < 20:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(path, key, f"a key of {where}", depth + 1)
            _check_plain(path, part, f"{where}[{ascii(key)[:60]}]", depth + 1)
    elif not isinstance(value, PLAIN):
        raise InputError(
            f"{path}: {where} is of type {type(value).__name__}, or nested too deep; make the checkpoint again"
        )


# ---------------------------------------------------------------------------------------------------- runs


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

        self.lock = claim(out)
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
        with replacing(self.path) as temporary:
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
        with room_for(self.path):
            with open(self.path, "a", newline="", encoding="utf-8") as f:
                csv.DictWriter(f, self.columns).writerow(
                    {"step": step, **shown, **({"note": note} if note else {})}
                )
            sync(self.path)
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


def start_run(stage, args, data, inputs=(), free=(), folder=None):
    """Looks at last.pt in a folder (default: OUT) before a run. -> the state to resume from, or of a run that is finished (state["finished"]), or
    None for a fresh start; and the checksums of its other files, {option: CRC-32 or None}, for the state's "inputs"

    data: what describes the data now; inputs: options that name other files, which may be elsewhere now, but must be the same. InputError if the
    folder holds an unfinished run and neither --resume nor --overwrite is given, or a run that was started with other data, files or
    options (those named in `free` may differ).
    """
    folder = folder or args.out
    last, found = (
        os.path.join(folder, "last.pt"),
        glob.glob(os.path.join(glob.escape(folder), "*.pt")),
    )
    sums = {name: checksum(getattr(args, name)) for name in inputs}
    if args.resume and args.overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it: choose one")
    if (
        args.overwrite or not found or (args.resume and not os.path.isfile(last))
    ):  # killed before its first last.pt, a run begins again
        return None, sums
    if not os.path.isfile(last):
        raise InputError(
            f"{folder}: holds a run, but no last.pt; begin again with --resume or --overwrite, or choose another --out"
        )
    state = load_checkpoint(last, stage)
    if not state["finished"] and state.get("training") != TRAINING:
        raise InputError(
            f"{last}: was started by another version, whose losses are others; replace it with --overwrite, or choose another --out"
        )
    for key, value in vars(args).items():
        if (
            key not in state["args"] and not value
        ):  # an option that is younger than the run, and off
            continue
        if (
            key not in {"resume", "overwrite", "out", "data", "device", *inputs, *free}
            and state["args"].get(key) != value
        ):
            raise InputError(
                f"{last}: was started with --{key.replace('_', '-')} {state['args'].get(key)}, not {value}; "
                "replace it with --overwrite, or choose another --out"
            )
    for key, value in data.items():
        if state["data"].get(key) != value:
            raise InputError(
                f"{last}: was started on other data ({key} {state['data'].get(key)}, not {value}); "
                "replace it with --overwrite, or choose another --out"
            )
    for key, value in sums.items():
        if state["inputs"].get(key) != value:
            raise InputError(
                f"{last}: was started with another file as --{key} than {getattr(args, key)} is now; "
                "replace it with --overwrite, or choose another --out"
            )
    if not args.resume and not state["finished"]:
        raise InputError(
            f"{args.out}: holds an unfinished run; go on with --resume, replace it with --overwrite, or choose another --out"
        )
    return state, sums


def check_finite(parts, names, nets, step, advice):
    """InputError if a number of `parts` [n, len(names)], those of the n steps up to `step`, or a weight of a network is not finite. Called before
    anything is saved, so that files keep the last good state. advice: {name: value of that step} -> what to try"""
    parts = parts.cpu()
    if not parts.isfinite().all():
        row = int((~parts.isfinite()).any(1).nonzero()[0, 0])
        values = dict(zip(names, parts[row].tolist()))
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise InputError(
            f"step {step - len(parts) + 1 + row}: the loss is not finite ({terms}), nothing of it was saved; {advice(values)}"
        )
    for net in nets:
        if wrong := [
            name for name, value in net.state_dict().items() if not value.isfinite().all()
        ]:
            raise InputError(
                f"step {step}: weights are not finite ({wrong[0]}), nothing of it was saved; {advice({})}"
            )
