"""The command line: argparse types, the parser of all scripts, and how a script ends.

A script ends with exit code 2 and one line where its input is wrong; see cli().
"""

import argparse
import errno
import functools
import io
import math
import os
import sys
import tempfile
import threading

from data.files import DiskFull, InputError
from data.workers import handle_ends, leave_terminal


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviations, and errors of one line."""

    def __init__(self, doc, **kwargs):
        self.group = None
        super().__init__(description=doc, allow_abbrev=False, formatter_class=_Help, **kwargs)

    def section(self, title):
        """The options that are added from here on stand under a title of their own in --help."""
        self.group = self.add_argument_group(title)

    def add_argument(self, *args, **kwargs):
        """As in argparse, under the title of the section."""
        section = super() if self.group is None else self.group
        return section.add_argument(*args, **kwargs)

    def _get_value(self, action, arg_string):
        """What argparse makes of a word. It may be empty where a variable of a shell is not set."""
        value = super()._get_value(action, arg_string)
        if not arg_string:
            raise argparse.ArgumentError(action, "is empty; give a value, or leave the option out")
        return value

    def error(self, message):
        """Ends the script with exit code 2 and one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; --help shows the options\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default == []:  # which tell a reader nothing
            return action.help
        if isinstance(default, float) and "%(default)" not in action.help:
            return f"{action.help} (default: {default:.3g})"
        return super()._get_help_string(action)


def number(low, high=math.inf, kind=int):
    """argparse type: a number of a kind in [low, high]."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses NaN
            allowed = f"in {low} to {high}" if high < math.inf else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def numbers(text):
    """argparse type: whole numbers of at least 1, joined by commas, in order."""
    return sorted({number(1)(part) for part in text.split(",")})


def ordered_numbers(text):
    """argparse type: different whole numbers of at least 0, joined by commas. -> a list"""
    found = [number(0)(part) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: a number comes twice")
    return found


ordered_numbers.__name__ = "number"  # argparse names it in its errors


def decimals(count, low=-math.inf):
    """argparse type: so many numbers above `low`, joined by commas. -> a tuple"""

    def parse(text):
        """The numbers of a text. ArgumentTypeError: not so many, or too low."""
        try:
            values = tuple(map(float, text.split(",")))
        except ValueError:
            values = ()
        if len(values) != count or not all(low < v < math.inf for v in values):
            above = f" above {low}" if low > -math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {count} numbers{above}, as in 1,2.5")
        return values

    return parse


def grid(text):
    """argparse type: one whole number of at least 1, or three joined by commas. -> a tuple"""
    sizes = tuple(number(1)(part) for part in text.split(","))
    if len(sizes) not in (1, 3):
        raise argparse.ArgumentTypeError(
            f"{text} is neither one number nor three, as in 80,112,112"
        )
    return sizes


grid.__name__ = "size"  # argparse names it in its errors


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


def file(text):
    """argparse type: a file in a folder that can be written to, or made."""
    folder(os.path.dirname(text) or ".")
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file")
    if not os.path.basename(text) or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: a folder, not a file; name a file in it")
    if os.path.exists(text) and not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text}: a device or pipe, not a file; choose another")
    return text


def picture(text):
    """argparse type: a PNG file in a folder that can be written to, or made."""
    if not file(text).lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text}: pictures are PNG files; name it .png")
    if os.path.isfile(text) and not _is_figure(text):
        raise argparse.ArgumentTypeError(f"{text}: is there already, and no figure; choose another")
    return text


def _is_figure(path):
    """Whether a file begins as figures of Matplotlib do, all of which may be drawn again."""
    with open(path, "rb") as f:
        head = f.read(1000)
    return not head or head.startswith(b"\x89PNG") and b"Software\0Matplotlib" in head


def flip_axes(text):
    """argparse type: letters of the axes D, H, W, joined by commas, or none. -> them, in order"""
    names = text.replace(" ", "").upper().split(",")
    if text.strip().lower() == "none":
        return "none"
    if len(set(names)) < len(names) or not set(names) <= set("DHW"):
        raise argparse.ArgumentTypeError(f"{text}: neither none nor axes of D, H, W, as in H,W")
    return ",".join(sorted(names))


def note_idle(args, names, defaults):
    """A note on those of the named options that were given, though a run does not look at them.

    args, defaults: Namespace, of the run and of one for which nothing is given.
    """
    given = [name for name in names if getattr(args, name) != getattr(defaults, name)]
    if given:
        words = ", ".join("--" + name.replace("_", "-") for name in given)
        print(f"note: without effect in this run: {words}")


SHARE = number(0, 1, float)
SEED = number(0, 2**40)


def seed_of(seed, step, stream):
    """The seed of one step's random numbers of one kind (stream), from the seed of everything.

    A resumed run draws what it would have drawn.
    """
    return seed * 1_000_003 + step + stream * 2**41


def cli(main):
    """Runs a script's main().

    Wrong input ends in one line on standard error and exit code 2, Ctrl-C in 130, SIGTERM in 143,
    a closed terminal in 129.
    """
    _be_quiet_where_told_elsewhere()
    # unwinds, so that temporary files are removed
    handle_ends(_end)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by >&-, and no script or library expects that
            setattr(sys, name, open(os.devnull, "w"))
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


def _end(number, _):
    """What a signal does to a script."""
    leave_terminal(number)
    sys.exit(128 + number)


def _be_quiet_where_told_elsewhere():
    """Drops the words of TensorBoard's thread, and of h5py, on a disk that is full.

    Both fail again at each part of a file that they cannot write. DiskFull tells it once.
    """
    threading.excepthook = _unless_of_the_system
    sys.excepthook = functools.partial(_unless_of_h5py, sys.__excepthook__)
    sys.unraisablehook = functools.partial(_unless_of_h5py, sys.__unraisablehook__)


def _unless_of_the_system(failed):
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def _unless_of_h5py(usual, *failed):
    error = failed[1] if len(failed) == 3 else failed[0].exc_value
    if "decrement id ref count" not in str(error):
        usual(*failed)


def _complain(error, code):
    """Prints an error as one line. -> the exit code"""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text += "; what is printed may go to this disk, too: make room"
    if isinstance(error, PermissionError):
        text += "; ask its owner for permission, or choose another"
    text = " ".join(text.split())
    line = "".join(c if c.isprintable() else "?" for c in text)  # file names may hold anything
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    return code
