"""Files: errors that a user can act on, text files of any encoding, and files that appear whole.

Reading comes first, then writing: replacing() for a file that appears whole or not at all, claim()
for a folder that one process alone writes to.
"""

import codecs
import contextlib
import csv
import errno
import glob
import os
import re
import shutil
import zlib

from filelock import FileLock, Timeout

FORMAT = 1  # of every file that a stage hands to the next one


class InputError(Exception):
    """Something given by the user is wrong.

    The message says what, where, and how to mend it, in one line.
    """


class DiskFull(InputError):
    """A file could not be written for lack of room. What was there before is untouched."""


# ---------------------------------------------------------------------------- errors of the system

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of a file system


def errno_of(error):
    """The system's number for an error, 0 if it has none. HDF5 may tell it in its text alone."""
    if not isinstance(error, (OSError, RuntimeError)):
        return 0
    if getattr(error, "errno", None):
        return error.errno
    said = re.search(r"errno = (\d+)", str(error))
    return int(said[1]) if said else 0


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


HDF5, CHECKPOINT = "an HDF5 file", "a checkpoint (or another zip archive)"
BEGINNINGS = {b"\x89HDF": HDF5, b"PK\3\4": CHECKPOINT}


def kind_of(path):
    """What a file is by its first bytes, HDF5 or CHECKPOINT; None for neither."""
    with open(path, "rb") as f:
        return BEGINNINGS.get(f.read(4))


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
    except (OSError, RuntimeError) as error:  # h5py raises the second where it cannot close a file
        number = errno_of(error)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            f"{path}: cannot be written ({os.strerror(number)}); make room and run the same "
            "command again, with --resume if it has that option; what was there before is untouched"
        ) from None


# -------------------------------------------------------------------------------------- text files


def read_text(path):
    """A text file that a user made: UTF-8, or UTF-16 with its mark.

    InputError for other encodings.
    """
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


# ----------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`.

    The file there takes the place of `path` if the block ends well, else it is removed.
    """
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
    with contextlib.suppress(PermissionError):  # Windows does not open folders
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def claim(out, *inside):
    """Makes a folder and takes it for this process, as long as the lock is kept. -> the lock

    What killed processes left half-written there, and in its subfolders `inside`, is removed.
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
    for part in ("", *inside):
        for left in glob.glob(os.path.join(glob.escape(out), part, ".*.[0-9]*.part")):
            folder = os.path.isdir(left) and not os.path.islink(left)
            shutil.rmtree(left) if folder else os.remove(left)
    return lock


def checksum(path):
    """CRC-32 of a file; None for no file. InputError if it is not there."""
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
