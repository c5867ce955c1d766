"""What the system refuses is told from damage.

Permissions, locks, and consoles that lack characters.
"""

import errno
import fcntl
import io
import os
import stat
import sys
import tempfile
from pathlib import Path

import h5py
import pytest
from conftest import make_pictures, python

import corrupt
from data import files, h5, images
from data.files import InputError, claim
from data.log import Log
from data.options import cli
from models.checkpoints import load_checkpoint, save_checkpoint


@pytest.fixture
def dataset(tmp_path):
    with h5py.File(tmp_path / "d.h5", "w") as f:
        f["a"] = 1
    return tmp_path / "d.h5"


LOCK = "Unable to synchronously open file (unable to lock file, errno = {}, error message = '...')"
OPEN = "Unable to synchronously open file (unable to open file: name = 'd', errno = {}, ...)"


@pytest.mark.parametrize(
    "number, text, words",
    [
        (errno.EAGAIN, LOCK, "another process is writing to it; wait"),
        (None, LOCK.format(errno.EAGAIN), "another process is writing to it; wait"),
        (errno.EACCES, LOCK, "another process is writing to it"),  # some file systems say so
        (
            None,
            "file is already open for write (may use h5clear)",
            "another process is writing to it, or was killed while it did; wait until it ends, or, "
            "if none does, run h5clear -s",
        ),
        (errno.EACCES, OPEN, "not permitted to read it; ask"),
        (errno.EPERM, OPEN, "not permitted to read it; ask"),
        (None, OPEN.format(errno.EACCES), "not permitted to read it; ask"),
        (errno.EIO, OPEN, f"cannot be read ({os.strerror(errno.EIO)}); try again"),
        (errno.ESTALE, OPEN, f"cannot be read ({os.strerror(errno.ESTALE)}); try again"),
        (errno.EINVAL, "seek failed", "not a readable HDF5 file (truncated?); convert"),
        (None, "truncated file: eof = 5000", "not a readable HDF5 file (truncated?); convert"),
        (None, "file signature not found", "not a readable HDF5 file (truncated?); convert"),
    ],
)
def test_why_a_file_is_not_opened(number, text, words, dataset, monkeypatch):
    def fail(*_, **__):
        raise OSError(number, text.format(number)) if number else OSError(text)

    monkeypatch.setattr(h5py, "File", fail)
    with pytest.raises(InputError) as found:
        h5.open_file(dataset)
    assert str(found.value).startswith(f"{dataset}: {words}")


@pytest.mark.parametrize(
    "number, text",
    [(n, LOCK) for n in sorted(files.NO_LOCKS)]
    + [(None, "(file locking flag values don't match)")],
)
def test_a_file_system_without_locks_is_read_without(number, text, dataset, monkeypatch):
    usual = h5py.File

    def without_locks(path, mode, locking=None):
        if locking is False:
            return usual(path, mode)
        raise OSError(number, text.format(number)) if number else OSError(text)

    monkeypatch.setattr(h5py, "File", without_locks)
    with h5.open_file(dataset) as f:
        assert f["a"][()] == 1


def test_a_file_that_is_locked(dataset):
    with open(dataset, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="d.h5: another process is writing to it; wait until"):
            h5.open_file(dataset)
    h5.open_file(dataset).close()


@pytest.fixture
def stranger():
    """A folder, and this process as a user who may not read what is closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        user = os.geteuid()

        def become():
            if user == 0:
                os.seteuid(65534)

        try:
            yield Path(folder), become
        finally:
            os.seteuid(user)


@pytest.mark.parametrize(
    "closed, words",
    [
        ("file", "not permitted to read it; ask its owner"),
        ("folder", "not permitted to look into its folder; give"),
    ],
)
def test_what_is_not_permitted(closed, words, stranger):
    folder, become = stranger
    inner = folder / "inner"
    inner.mkdir()
    with h5py.File(inner / "d.h5", "w") as f:
        f["a"] = 1
    save_checkpoint(inner / "c.pt", "weak", weights={})
    for path in inner.iterdir():
        path.chmod(0)
    inner.chmod(0 if closed == "folder" else 0o755)
    become()
    try:
        for path, read in (("d.h5", h5.open_file), ("c.pt", lambda p: load_checkpoint(p, "weak"))):
            with pytest.raises(InputError) as found:
                read(inner / path)
            assert str(found.value).startswith(f"{inner / path}: {words}")
    finally:
        os.seteuid(os.getuid())
        inner.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("name", ["images/p0.png", "masks/p0.png", "train.txt"])
def test_a_source_that_is_not_permitted(name, stranger, refused):
    folder, become = stranger
    make_pictures(folder, 1)
    (folder / "train.txt").write_text("p0")
    argv = [str(folder), "--out", str(folder / "o.h5")]
    images.main(argv)  # Python loads some of itself late, which the stranger may not
    (folder / name).chmod(0)
    folder.chmod(0o777)
    become()
    refused(images.main, argv, f"{name}: Permission denied; ask its owner")


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "d.h5")
    with pytest.raises(InputError, match="d.h5: a device or pipe, not a file; give the HDF5 file"):
        h5.open_file(tmp_path / "d.h5")


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_while_a_file_is_read(error):
    with pytest.raises(InputError, match=r"d.h5: cannot be read \(.*\); try again, or copy it"):
        with h5.reading("d.h5"):
            raise OSError(f"Can't read data (file read failed: errno = {error}, ...)")
    with pytest.raises(InputError, match="d.h5: damaged or incomplete"):
        with h5.reading("d.h5"):
            raise OSError("Can't read data (inflate() failed)")


@pytest.mark.parametrize("number", sorted(files.NO_LOCKS))
def test_a_run_goes_on_where_nothing_can_be_locked(number, tmp_path, monkeypatch, recwarn):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    (tmp_path / ".x.pt.1.part").touch()
    for _ in range(2):  # nor does what the first leaves keep the second one out
        claim(str(tmp_path))
    assert not (tmp_path / ".x.pt.1.part").exists() and not recwarn.list


def test_a_disk_that_fails_while_a_folder_is_locked(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        claim(str(tmp_path))


# ---------------------------------------------------------------------- characters


@pytest.mark.parametrize(
    "encoding, shown",
    [("cp1252", "\\u0394 ± \\udcff"), ("ascii", "\\u0394 \\xb1 \\udcff"), ("utf-8", "Δ ± \\udcff")],
)
def test_a_console_that_lacks_characters(encoding, shown, monkeypatch):
    """The last of them is what Python makes of a file name's byte that is no UTF-8."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)
    cli(
        lambda: [
            print("Δ ± \udcff", file=stream, flush=True) for stream in (sys.stdout, sys.stderr)
        ]
    )
    assert [s.buffer.getvalue().decode(encoding) for s in streams] == [f"{shown}\n"] * 2


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_console_that_is_closed(name, monkeypatch):
    """Python has None in the place of a stream that >&- has closed."""
    monkeypatch.setattr(sys, name, None)
    terminal = []

    def main():
        stream = getattr(sys, name)
        print("\u0394", file=stream, flush=True)
        terminal.append(stream.isatty())
        stream.close()

    cli(main)
    assert terminal == [False]


SHOW = """
from data.options import Parser, cli
from tqdm import tqdm
def main():
    for _ in tqdm(range(2), desc="Δ"):
        tqdm.write("val_Δ")
    Parser("Δ ± λ", prog="x").parse_args(["--help"])
cli(main)
"""


def test_help_and_bars_on_a_console_of_ascii():
    done = python("-c", SHOW, env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    assert "val_\\u0394" in done.stdout and "\\u0394 \\xb1 \\u03bb" in done.stdout
    assert "\\u0394: 100%" in done.stderr


@pytest.mark.parametrize("option", ["--out", "--preview"])
def test_a_folder_of_other_bytes_is_refused(option, tmp_path, refused):
    """TensorBoard, for one, writes to none."""
    argv = ["d.h5", "--out", tmp_path, option, tmp_path / "n\udcff" / "p.png"]
    refused(corrupt.parse_args, argv, option, "n\\udcff", "is not UTF-8; choose another")


def test_a_log_is_utf8_wherever_it_is_written(tmp_path, monkeypatch):
    """Also where files are of another encoding unless one is named."""
    usual = open

    def latin(path, mode="r", *args, **more):
        more = more if "b" in mode else {"encoding": "latin-1"} | more
        return usual(path, mode, *args, **more)

    monkeypatch.setattr("builtins.open", latin)
    for after in (0, 1):
        log = Log(str(tmp_path), ["step", "val_Δ", "note"], after)
        log.write(after + 1, note="Δ", **{"val_Δ": 0.5})
        log.events.close()
    monkeypatch.undo()
    text = (tmp_path / "log.csv").read_text(encoding="utf-8")
    assert text.split() == ["step,val_Δ,note", "1,0.5,Δ", "2,0.5,Δ"]
