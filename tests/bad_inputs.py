"""Bad inputs for all stages, made from small phantom datasets, each run in a process of its own.

    python tests/bad_inputs.py
        prints a table of the stages, and every input with what is said of it (Markdown)
    python tests/bad_inputs.py FOLDER FILE.json
        writes what the tests read: each kind of input once, not at every place that reads it

What is asked of the answers is in test_bad_input.py. The scripts are imported once, and each input
is given to a forked child, so that one costs a fraction of a second, and a crash or a hang ends
nothing but the child.
"""

import contextlib
import copy
import fcntl
import functools
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import cv2
import h5py
import nibabel
import numpy as np
import SimpleITK as sitk
import torch
import torch._dynamo  # else each child imports it with its first optimizer, which takes seconds

sys.path.insert(0, str(Path(__file__).parent.parent))

import corrupt  # noqa: E402
import evaluate  # noqa: E402
import train_qp  # noqa: E402
import train_ssl  # noqa: E402
from data import figures, h5, images, nifti, phantom, pixels, ssl4mis  # noqa: E402
from data.options import cli

SECONDS = 20  # then a child is killed
MAINS = {
    "corrupt.py": corrupt.main,
    "train_qp.py": train_qp.main,
    "train_ssl.py": train_ssl.main,
    "evaluate.py": evaluate.main,
    "data.h5": h5.main,
    "data.images": images.main,
    "data.nifti": nifti.main,
    "data.ssl4mis": ssl4mis.main,
    "data.phantom": phantom.main,
}
STAGES = ("corrupt.py", "train_qp.py", "train_ssl.py", "evaluate.py")
A, V = "train/phantom000", "val/phantom004"  # cases that the stages read
BOTH = (A, V)


# ---------------------------------------------------------------------------- one input, in a child


def in_child(main, argv, log, limit=SECONDS):
    """Runs main(argv) as a script does.

    -> exit code (negative: the signal that ended it), stderr, seconds, peak bytes of memory (with
    all that is imported)
    """
    sys.stdout.flush(), sys.stderr.flush()
    start = time.perf_counter()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.alarm(limit)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for fd, end in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            sys.argv = [main, *argv]
            cli(lambda: MAINS[main](argv))
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    _, status, usage = os.wait4(pid, 0)
    return (
        os.waitstatus_to_exitcode(status),
        Path(f"{log}.err").read_text(errors="replace"),
        time.perf_counter() - start,
        usage.ru_maxrss * 1024,
    )


def listing(folder):
    """What lies in a folder, but for the empty file that says who writes there."""
    return sorted(
        (str(p), 0 if p.is_dir() else p.lstat().st_size, 0 if p.is_dir() else p.lstat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.name != ".lock"
    )


# -------------------------------------------------------------------------------------- good inputs


def make_base(folder):
    """A dataset of slices, one of volumes, and what all stages make of them."""

    def do(main, *argv, options):
        argv = [*map(str, argv), *options.split()]
        code, error, *_ = in_child(main, argv, folder / "log", limit=300)
        assert code == 0, error

    flat = (2, "32", "--depth 4 --size 40")
    deep = (3, "16,32,32", "--depth 16 --size 32")
    for dims, size, grid in (flat, deep):
        base = folder / f"{dims}d"
        base.mkdir(parents=True)
        data = base / "data.h5"
        vqm = base / "vqm"
        cases = f"--train 4 --val 2 --test 1 --dims {dims} {grid}"
        do("data.phantom", "--out", data, options=cases)
        masks = f"--size {size} --masks 4 --val-masks 2 --patches 1 --labeled 3 --folds 1"
        harvest = "--harvest-epochs 1 --harvest-steps 1"
        do("corrupt.py", data, "--out", vqm, options=f"{masks} {harvest}")
        small = "--width 4 --members 1 --epochs 1 --amp off"
        do("train_qp.py", data, "--vqm", vqm / "vqm.h5", "--out", base / "qp", options=small)
        step = f"--size {size} --steps 1 --batch 2 --width 4 --labeled 3 --amp off"
        do("train_ssl.py", data, "--out", base / "run", options=step)
    return folder


# ---------------------------------------------------------------------------------------- bad bytes


def cut(share):
    return lambda data: data[: int(len(data) * share)]


def flip(seed, count=3):
    def change(data):
        data, rng = bytearray(data), np.random.default_rng(seed)
        for at in rng.integers(len(data), size=count):
            data[at] ^= 1 << int(rng.integers(8))
        return bytes(data)

    return change


BYTES = {
    "empty": lambda data: b"",
    "text": lambda data: b"these are not the data\n" * 100,
    "zeros": lambda data: bytes(len(data)),
    **{f"cut at {share:.2%}": cut(share) for share in (0.0005, 0.02, 0.3, 0.6, 0.9, 0.9999)},
}
# a flipped length of a text lets HDF5 2.0 itself loop for ever: it is not among these
FLIPS = {f"flipped bits {seed}": flip(seed) for seed in (0, 1, 3)}


# --------------------------------------------------------- bad datasets: change(f), f the open file


def attr(path, name, value=None):
    """Another value of an attribute; None: without it."""

    def change(f):
        del f[path].attrs[name]
        if value is not None:
            f[path].attrs[name] = value

    return change


def replaced(name, make, cases=BOTH):
    """Another dataset in the place of one: what make(old) gives."""

    def change(f):
        for case in cases:
            new = make(f[case][name][()])
            del f[case][name]
            f[case][name] = new

    return change


def instead(path, put):
    """Something else in the place of a member: put(group, name)."""

    def change(f):
        group, name = f[path].parent, path.split("/")[-1]
        del group[name]
        put(group, name)

    return change


def within(change, name, cases=BOTH):
    """Some pixels changed in place."""

    def go(f):
        for case in cases:
            value = f[case][name][()]
            change(value)
            f[case][name][...] = value

    return go


def huge(f, shape=(1000, 100_000, 100_000), **how):
    for case in BOTH:
        for name in ("image", "label"):
            del f[case][name]
            f[case].create_dataset(name, shape, "uint8", **how)


def sparse(f):
    """4 TiB of zeros that the file does hold, as a hole of its file system."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY), plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    h5py.h5d.create(
        f.id, b"zeros", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((1024, 65536, 65536)), plist
    )
    for case in BOTH:
        for name in ("image", "label"):
            del f[case][name]
            f[case][name] = f["zeros"]
    del f["zeros"]


def external(group, name):
    group.create_dataset(
        name,
        (4, 40, 40),
        "uint8",
        external=[(str(Path(group.file.filename).with_suffix(".raw")), 0, 6400)],
    )


def virtual(group, name):
    layout = h5py.VirtualLayout((4, 40, 40), "float32")
    layout[:] = h5py.VirtualSource(".", A.replace("000", "001") + "/image", (4, 40, 40))
    group.create_virtual_dataset(name, layout)


def every(name, value):
    """All labels of a split are `value`, and checked as such."""

    def change(f):
        for case in f[name].values():
            case["label"][...] = value
            case.attrs["checksum"] = h5.checksum_of(case["image"][()], case["label"][()])

    return change


def unlabeled(split):
    def change(f):
        for case in f[split].values():
            del case["label"]

    return change


def renamed(name):
    return lambda f: f.move(A, f"train/{name}")


def raw_name(name):
    def change(f):
        h5py.h5o.link(f[A].id, f["train"].id, name)
        del f[A]

    return change


def only(*cases):
    def change(f):
        for split in list(f):
            for name in list(f[split]):
                if f"{split}/{name}" not in cases:
                    del f[split][name]

    return change


def one_pixel(side):
    def change(f):
        for name in ("image", "label"):
            replaced(name, lambda old: old[:, :side, :side])(f)

    return change


def set_pixel(value):
    def change(pixels):
        pixels[0, 5, 5] = value

    return change


text = h5py.string_dtype()
DATASETS = {
    **{
        f"no attribute {name}": attr("/", name)
        for name in ("format", "name", "classes", "dims", "channels")
    },
    **{
        f"a case without attribute {name}": attr(A, name)
        for name in ("patient", "spacing", "spacing_known", "source")
    },
    "no attribute at all": lambda f: [f.attrs.__delitem__(k) for k in list(f.attrs)],
    "format is a text": attr("/", "format", "1"),
    "format 2": attr("/", "format", 2),
    "format is an array": attr("/", "format", [1, 1]),
    "classes is a text": attr("/", "classes", "background"),
    "classes are numbers": attr("/", "classes", [0, 1, 2, 3]),
    "classes is a scalar number": attr("/", "classes", 4),
    "no classes": attr("/", "classes", np.array([], text)),
    "one class": attr("/", "classes", ["background"]),
    "two equal classes": attr("/", "classes", ["background", "a", "b", "a"]),
    "300 classes": attr("/", "classes", [f"c{i}" for i in range(300)]),
    "a class without a name": attr("/", "classes", ["background", "", "b", "c"]),
    "a class with a newline": attr("/", "classes", ["background", "a\nb", "c", "d"]),
    "a class that moves the cursor": attr("/", "classes", ["background", "\x1b[2J", "c", "d"]),
    "dims is a text": attr("/", "dims", "2"),
    "dims is an array": attr("/", "dims", [2, 2]),
    "dims 4": attr("/", "dims", 4),
    "dims 2.5": attr("/", "dims", 2.5),
    "dims is empty": attr("/", "dims", h5py.Empty("int64")),
    "channels 2": attr("/", "channels", 2),
    "channels 3 of gray": attr("/", "channels", 3),
    "channels is a text": attr("/", "channels", "one"),
    "standardize is a text": attr("/", "standardize", "no"),
    "name is a number": attr("/", "name", 7),
    "patient is an array": attr(A, "patient", ["a", "b"]),
    "patient is a number": attr(A, "patient", 7),
    "patient is unprintable": attr(A, "patient", "a\x1b[31m"),
    "spacing is a text": attr(A, "spacing", "1 mm"),
    "spacing is NaN": attr(A, "spacing", [1.0, np.nan, 1.0]),
    "spacing 0": attr(A, "spacing", [1.0, 0.0, 1.0]),
    "spacing is negative": attr(A, "spacing", [1.0, -1.0, 1.0]),
    "spacing is infinite": attr(A, "spacing", [1.0, np.inf, 1.0]),
    "spacing of two axes": attr(A, "spacing", [1.0, 1.0]),
    "checksum is a text": attr(A, "checksum", "none"),
    "checksum of other pixels": lambda f: [
        f[case].attrs.__setitem__("checksum", 1) for case in BOTH
    ],
    "affine is a text": lambda f: f[A].attrs.__setitem__("affine", "none"),
    "affine is NaN": lambda f: f[A].attrs.__setitem__("affine", np.full((4, 4), np.nan)),
    "nifti_header is a text": lambda f: f[A].attrs.__setitem__("nifti_header", "none"),
    "nifti_header without affine": lambda f: f[A].attrs.__setitem__(
        "nifti_header", np.zeros(348, np.uint8)
    ),
    "source_label without source_grid": lambda f: f[A].__setitem__(
        "source_label", np.zeros((4, 40, 40), np.uint8)
    ),
    "source_label is a group": lambda f: f[A].create_group("source_label"),
    "source_grid of two axes": lambda f: f[A].attrs.__setitem__("source_grid", [4, 4]),
    "no image": lambda f: f[A].__delitem__("image"),
    "an empty case": instead(A, lambda g, n: g.create_group(n)),
    "image is a group": instead(f"{A}/image", lambda g, n: g.create_group(n)),
    "label is a group": instead(f"{A}/label", lambda g, n: g.create_group(n)),
    "image is a type": instead(f"{A}/image", lambda g, n: g.__setitem__(n, np.dtype("uint8"))),
    "a split is a dataset": instead("train", lambda g, n: g.__setitem__(n, np.zeros(3))),
    "a case is a dataset": instead(A, lambda g, n: g.__setitem__(n, np.zeros((9, 9)))),
    **{
        f"image of {kind}": replaced("image", lambda old, kind=kind: old.astype(kind))
        for kind in ("float64", "int32", "float16", ">f4", "bool", "complex64")
    },
    "image of texts": replaced("image", lambda old: np.full(old.shape, b"x")),
    "image is compound": replaced(
        "image", lambda old: np.zeros(old.shape, [("a", "u1"), ("b", "u1")])
    ),
    "image is empty": instead(
        f"{A}/image", lambda g, n: g.create_dataset(n, data=h5py.Empty("float32"))
    ),
    "image is a number": replaced("image", lambda old: np.float32(1)),
    "image of no pixel": replaced("image", lambda old: old[:, :0]),
    "image of one axis": replaced("image", lambda old: old.ravel()),
    "image of five axes": replaced("image", lambda old: old[None, None]),
    "label of int64": replaced("label", lambda old: old.astype("int64")),
    "label of float32": replaced("label", lambda old: old.astype("float32")),
    "label of texts": replaced("label", lambda old: np.full(old.shape, b"x")),
    "label of another shape": replaced("label", lambda old: old[:, 1:]),
    "label of another rank": replaced("label", lambda old: old[0]),
    "image is NaN": within(set_pixel(np.nan), "image"),
    "image is infinite": within(set_pixel(-np.inf), "image"),
    "labels out of range": within(set_pixel(4), "label"),
    "label 255": within(set_pixel(255), "label"),
    "other pixels": within(set_pixel(0.25), "image"),
    "other labels": within(lambda y: y.fill(1), "label"),
    "1 x 1 pixel": one_pixel(1),
    "7 x 7 pixels": one_pixel(7),
    "all labels empty": every("train", 0),
    "no label in train": unlabeled("train"),
    "no label in val": unlabeled("val"),
    "no val": lambda f: f.__delitem__("val"),
    "empty val": lambda f: [f["val"].__delitem__(n) for n in list(f["val"])],
    "one case": only(A),
    "nothing in it": only(),
    "val alone": only(V),
    "no split": lambda f: [f.__delitem__(s) for s in list(f)],
    "a patient in two splits": lambda f: f[V].attrs.__setitem__("patient", "phantom000"),
    "sizes that are not there": lambda f: huge(f, chunks=(1, 1000, 1000), compression="gzip"),
    "sizes that are not there, contiguous": huge,
    "2 GB that are not there": lambda f: huge(f, (20, 10_000, 10_000), chunks=(1, 1000, 1000)),
    "4 TiB": sparse,
    "external storage": instead(f"{A}/image", external),
    "a virtual dataset": instead(f"{A}/image", virtual),
    "a soft link": instead(
        f"{A}/image",
        lambda g, n: g.__setitem__(n, h5py.SoftLink(f"/{A.replace('000', '001')}/image")),
    ),
    "a dangling link": instead(
        f"{A}/label", lambda g, n: g.__setitem__(n, h5py.SoftLink("/nowhere"))
    ),
    "a link to itself": instead(A, lambda g, n: g.__setitem__(n, h5py.SoftLink(f"/{A}"))),
    "a split is a link": instead("val", lambda g, n: g.__setitem__(n, h5py.SoftLink("/test"))),
    "an external link": instead(
        A, lambda g, n: g.__setitem__(n, h5py.ExternalLink("/etc/passwd", "/"))
    ),
    "a link to another file": instead(
        "train", lambda g, n: g.__setitem__(n, h5py.ExternalLink("../2d/data.h5", "/train"))
    ),
    "a case that is its split": instead(A, lambda g, n: g.__setitem__(n, g)),
    "case ..": raw_name(b".."),
    "case .hidden": raw_name(b".hidden"),
    "case a\\b": renamed("a\\b"),
    "case with a newline": renamed("a\nb"),
    "case with an escape": renamed("\x1b[31mred"),
    "case of 201 bytes": renamed("x" * 201),
    "case of 150 letters, 300 bytes": renamed("\u00e9" * 150),
    "case of wrong UTF-8": raw_name(b"a\xff\xfe"),
}
NOT_READ = {
    ("all labels empty", "evaluate.py"),
    ("no label in train", "evaluate.py"),
    ("val alone", "evaluate.py"),
}


# --------------------------------------------------------------------------------------- bad vqm.h5


def rows(path, change):
    """Some rows of a dataset changed in place."""

    def go(f):
        value = f[path][()]
        value = change(value) if (made := change(value)) is None else made
        f[path][...] = f[path][()] if value is None else value

    return go


def put(index, value):
    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


def as_type(path, make):
    def change(f):
        new = make(f[path][()])
        del f[path]
        f[path] = new

    return change


VQM = {
    **{
        f"no {name}": attr("/", name)
        for name in ("format", "stage", "classes", "channels", "checksum", "spec")
    },
    "classes is a text": attr("/", "classes", "background"),
    "other classes": attr("/", "classes", ["a", "b", "c", "d"]),
    "channels is a text": attr("/", "channels", "1"),
    "spec is a number": attr("/", "spec", 3),
    "of another dataset": attr("/", "checksum", 1),
    "checksum is a text": attr("/", "checksum", "1"),
    **{
        f"no {path}": (lambda f, path=path: f.__delitem__(path))
        for path in (
            "train",
            "val",
            "real",
            "train/mask",
            "val/dice",
            "real/at",
            "train/case",
            "train/prob",
            "val/prob_index",
        )
    },
    "mask is a group": instead("train/mask", lambda g, n: g.create_group(n)),
    "train is a dataset": instead("train", lambda g, n: g.__setitem__(n, np.zeros(3))),
    "mask of int32": as_type("train/mask", lambda v: v.astype("int32")),
    "mask of float32": as_type("val/mask", lambda v: v.astype("float32")),
    "mask of two axes": as_type("train/mask", lambda v: v[:, 0]),
    "mask of four axes": as_type("train/mask", lambda v: v[..., None]),
    "masks of 8 x 8": as_type("train/mask", lambda v: v[:, :8, :8]),
    "masks that are no squares": as_type("train/mask", lambda v: v[:, :, :31]),
    "mask of a class too many": rows("train/mask", put((0, 0, 0), 4)),
    "mask 255 in real": rows("real/mask", put((0, 3, 3), 255)),
    "dice above 1": rows("train/dice", put((0, 0), 1.5)),
    "dice below 0": rows("val/dice", put((0, 0), -0.1)),
    "dice is NaN": rows("real/dice", put((0, 0), np.nan)),
    "dice of other classes": as_type("train/dice", lambda v: v[:, :1]),
    "dice of float64": as_type("train/dice", lambda v: v.astype("float64")),
    "a case that does not exist": rows("train/case", put(0, "nobody")),
    "a case of another split": rows("train/case", put(0, "phantom004")),
    "an unlabeled case": rows("train/case", put(0, "../../etc")),
    "case is a number": as_type("train/case", lambda v: np.arange(len(v))),
    "at beyond the case": rows("train/at", put((0, 0), 99)),
    "at is negative": rows("val/at", put((0, 0), -1)),
    "at of three axes": as_type("train/at", lambda v: np.repeat(v, 3, 1)),
    "a slice with more masks than others": rows("train/at", put((0, 0), 1)),
    "prob_index beyond": rows("train/prob_index", put(0, 10**6)),
    "prob_index below -1": rows("train/prob_index", put(0, -2)),
    "prob of other classes": as_type("train/prob", lambda v: v[:, :1]),
    "prob of float32": as_type("train/prob", lambda v: v.astype("float32")),
    "fewer dice than masks": as_type("train/dice", lambda v: v[:-1]),
    "an empty split": lambda f: [
        as_type(f"val/{n}", lambda v: v[:0])(f)
        for n in ("mask", "dice", "at", "case", "prob_index")
    ],
    "a soft link": instead("train/mask", lambda g, n: g.__setitem__(n, h5py.SoftLink("/val/mask"))),
    "an external link": instead(
        "val", lambda g, n: g.__setitem__(n, h5py.ExternalLink("data.h5", "/val"))
    ),
    "external storage": instead("train/mask", external),
    "mask declares 10 TB": instead(
        "train/mask",
        lambda g, n: g.create_dataset(n, (10**10, 32, 32), "uint8", chunks=(1, 32, 32)),
    ),
}
VQM3D = {
    "at is negative": rows("train/at", put((0, 0), -20)),
    "at beyond the volume": rows("train/at", put((0, 2), 30)),
    "patches too small": lambda f: [
        as_type(f"train/{n}", lambda v: v[..., :8])(f) for n in ("mask", "prob")
    ],
}


# ---------------------------------------------------------- bad checkpoints: change(state) -> state


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def without(*path):
    def change(state):
        at = state
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        return state

    return change


def given(value, *path):
    def change(state):
        at = state
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return state

    return change


def weights_of(state):
    return state["nets"][0] if "nets" in state else state["weights"]


def tensor(change):
    """Another tensor in the place of one of the weights; None: without it."""

    def go(state):
        weights = weights_of(state)
        name = list(weights)[1]  # of g's, the first is a single number
        new = change(weights[name])
        del weights[name]
        if new is not None:
            weights[name] = new
        return state

    return go


def spoiled(value):
    def change(t):
        t = t.clone(memory_format=torch.contiguous_format)
        t.view(-1)[0] = value
        return t

    return tensor(change)


def extra(state):
    weights_of(state)["another.weight"] = torch.zeros(3)
    return state


WINDOW = {"standardize": False, "prepared": {"from": "nifti", "window": [0, 1]}}
CHECKPOINTS = {
    "not a dict": lambda s: [1, 2],
    "empty dict": lambda s: {},
    "format 2": given(2, "format"),
    "format is a tensor": given(torch.ones(2), "format"),
    "no stage": without("stage"),
    "stage is a list": given([1], "stage"),
    **{f"no {key}": without(key) for key in ("model", "args", "data", "labeled")},
    "model is a text": given("unet", "model"),
    "model of an unknown name": given("transformer", "model", "name"),
    "model is one of another stage": None,
    "no channels in model": without("model", "channels"),
    "model has an unknown option": given(1, "model", "depth"),
    "width 10 ** 9": given(10**9, "model", "width"),
    "width 320, 2.9 GB": given(320, "model", "width"),
    "width is a text": given("wide", "model", "width"),
    "width 0": given(0, "model", "width"),
    "width -4": given(-4, "model", "width"),
    "another width": given(8, "model", "width"),
    "classes 10 ** 9 in model": given(10**9, "model", "classes"),
    "classes 5 in model": given(5, "model", "classes"),
    "channels 3 in model": given(3, "model", "channels"),
    "dims 3 in model": given(3, "model", "dims"),
    "data is a list": given([], "data"),
    "no classes in data": without("data", "classes"),
    "other classes in data": given(["a", "b", "c", "d"], "data", "classes"),
    "dims 3 in data": given(3, "data", "dims"),
    "channels is a text in data": given("1", "data", "channels"),
    "labeled is a number": given(3, "labeled"),
    "weights are NaN": spoiled(float("nan")),
    "weights are infinite": spoiled(float("inf")),
    "weights of another shape": tensor(lambda t: t[None]),
    "a tensor is missing": tensor(lambda t: None),
    "a tensor too many": extra,
    "a tensor is a number": tensor(lambda t: 1.0),
    "weights of float64": tensor(lambda t: t.double()),
    "weights of int64": tensor(lambda t: t.long()),
    "weights are sparse": tensor(lambda t: t.to_sparse()),
    "weights without storage": tensor(lambda t: t.to("meta")),
    "intensities of a window": given(False, "data", "standardize"),
    "intensities of a window that is known": lambda s: given(s["data"] | WINDOW, "data")(s),
    "flip is a number": given(3, "args", "flip"),
    "flip of an axis too many": given("D", "args", "flip"),
    "weights are a list": None,
}


def other_network(name):
    return lambda state: given(name, "model", "name")(state)


SSL = CHECKPOINTS | {
    "no nets": without("nets"),
    "nets is empty": given([], "nets"),
    "weights are a list": given([[1]], "nets"),
    "no teacher": without("teacher"),
    "model is one of another stage": other_network("quality_dense"),
    **{
        f"no {key} in args": without("args", key)
        for key in ("size", "seed", "method", "weight", "labeled")
    },
    "size 10 ** 9": given(10**9, "args", "size"),
    "size 0": given(0, "args", "size"),
    "size is a text": given("32", "args", "size"),
    "size of three": given((32, 32, 32), "args", "size"),
    "size is true": given(True, "args", "size"),
    "seed is a list": given([1], "args", "seed"),
    "method is a list": given([], "args", "method"),
}
QP = CHECKPOINTS | {
    "no weights": without("weights"),
    "weights are a list": given([1], "weights"),
    "model is one of another stage": other_network("unet"),
    "10 ** 9 members": given(10**9, "model", "members"),
    "two members": given(2, "model", "members"),
    "no members": given(0, "model", "members"),
    "members is a text": given("many", "model", "members"),
    "size 10 ** 9": given(10**9, "model", "size"),
    "size is a list": given([32], "model", "size"),
    "size of three": given((16, 16, 16), "model", "size"),
    "mask_dropout is NaN": given(float("nan"), "model", "mask_dropout"),
    "mask_dropout is a text": given("half", "model", "mask_dropout"),
    "temperature 0": given(torch.zeros(()), "weights", "temperature"),
    "another head": given("quality", "model", "name"),
}
LAST = {
    "not finished or what": without("finished"),
    "finished is a number": given(1, "finished"),
    "no optimizer": without("optimizer"),
    "no scaler": without("scaler"),
    "no best": without("best"),
    "best is a list": given([], "best"),
    "args is a list": given([], "args"),
    "of another stage": given("weak", "stage"),
}


@functools.cache
def loaded(source):
    return torch.load(source, weights_only=True)


def saved(change):
    def write(source, path, bomb):
        torch.save(change(copy.deepcopy(loaded(source))), path)

    return write


def zip_bomb(source, path, bomb):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
        new.open("archive/data.pkl", "w") as f,
    ):
        for _ in range(300):
            f.write(bytes(2**20))


def legacy_bomb(source, path, bomb):
    torch.save(
        dict(format=1, stage="ssl", bomb=Bomb(bomb)), path, _use_new_zipfile_serialization=False
    )


def plain_bomb(source, path, bomb):
    Path(path).write_bytes(pickle.dumps(Bomb(bomb)))


def tarred(source, path, bomb):
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            plain_bomb(None, f"{path}.{name}", bomb)
            tar.add(f"{path}.{name}", name)
            os.remove(f"{path}.{name}")


def script(source, path, bomb):
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)


FILES = {
    "legacy format": lambda source, path, bomb: torch.save(
        torch.load(source, weights_only=True), path, _use_new_zipfile_serialization=False
    ),
    "a pickle bomb": saved(lambda state: state),
    "a pickle bomb in the legacy format": legacy_bomb,
    "a plain pickle bomb": plain_bomb,
    "a tar with a bomb": tarred,
    "a zip bomb": zip_bomb,
    "an empty zip": lambda source, path, bomb: zipfile.ZipFile(path, "w").close(),
    "TorchScript": script,
}
FILES["a pickle bomb"] = lambda source, path, bomb: torch.save(
    torch.load(source, weights_only=True) | dict(bomb=Bomb(bomb)), path
)


# -------------------------------------------------------------------------------------- bad options

COMMON = {
    "no --out": (["DATA"], "--out"),
    "no data": (["--out", "OUT"], "required"),
    "unknown option": (["DATA", "--out", "OUT", "--nonsense"], "--nonsense"),
    "--out is a file": (["DATA", "--out", "DATA"], "--out"),
    "--out below a file": (["DATA", "--out", "DATA/out"], "--out"),
    "--out is empty": (["DATA", "--out", ""], "--out"),
    "--out cannot be written": (["DATA", "--out", "/proc/out"], "--out"),
    "--device cuda": (["DATA", "--out", "OUT", "--device", "cuda:9"], "--device"),
    "--device nonsense": (["DATA", "--out", "OUT", "--device", "tpu\nx"], "--device"),
    "--device meta": (["DATA", "--out", "OUT", "--device", "meta"], "--device"),
    "--amp fp8": (["DATA", "--out", "OUT", "--amp", "fp8"], "--amp"),
    "an abbreviation": (["DATA", "--out", "OUT", "--devic", "cpu"], "--devic"),
    "an argument too many": (["DATA", "DATA", "DATA", "--out", "OUT"], "DATA"),
}
MORE = {
    "corrupt.py": [
        "--labeled 0",
        "--labeled -1",
        "--labeled 1.5",
        "--labeled abc",
        "--labeled 99",
        "--labeled 0.0001",
        "--labeled 1.e999",
        "--labeled nan",
        "--size 0",
        "--size 31",
        "--size 100000",
        "--size 32,32",
        "--size 16,16,16",
        "--size x",
        "--size 1e3",
        "--masks 0",
        "--masks 1000000000",
        "--val-masks -1",
        "--harvest-share 1.5",
        "--harvest-share nan",
        "--folds 0",
        "--folds 9",
        "--harvest-epochs 0",
        "--harvest-epochs 1,,2",
        "--harvest-epochs x",
        "--harvest-batch 0",
        "--workers 0",
        "--workers 1000000",
        "--seed -1",
        "--seed 99999999999999999999",
        "--preview DATA/x.png",
        "--preview TMP",
        "--preview /proc/x/y.png",
        "--patches 0",
        "--foreground 2",
        "--foreground 0.5",
        "--labeled-seed x",
        "--flip D",
        "--flip X",
        "--flip none,H",
    ],
    "train_qp.py": [
        "--width 0",
        "--width 1000000000",
        "--members 0",
        "--members 1000000000",
        "--batch 1",
        "--batch 1000000000",
        "--lr -1",
        "--lr nan",
        "--lr inf",
        "--ema 1",
        "--ema nan",
        "--soft 2",
        "--epochs 0",
        "--head other",
        "--head scalar --width 4",
        "--encoder-weights DATA",
        "--head scalar --width 8 --encoder-weights none.pt",
        "--head scalar --width 8 --encoder-weights DATA",
        "--size 8",
        "--size 16,16,16",
        "--size 99999",
        "--select worst",
        "--resume --overwrite",
        "--flip D",
        "--flip 1",
        "--mask-dropout -1",
        "--strength nan",
        "--per-image 0",
        "--patience 0",
    ],
    "train_ssl.py": [
        "--labeled 0",
        "--labeled -1",
        "--labeled 1.5",
        "--labeled abc",
        "--qar 0.1",
        "--weight quality",
        "--qp none.pt --qar 1",
        "--size 16,16,16",
        "--size 31",
        "--size 1000000",
        "--stride 16",
        "--window whole",
        "--keep garbage",
        "--keep 0",
        "--keep 1,",
        "--resume --overwrite",
        "--lam nan",
        "--lam -1",
        "--lam inf",
        "--conf-threshold 1.1",
        "--ema 1",
        "--mix-alpha 0",
        "--temperature 0",
        "--method nonsense",
        "--model transformer",
        "--width 0",
        "--width 100000",
        "--dropout 0.5",
        "--model unetpp --encoder resnet9",
        "--encoder resnet18",
        "--encoder-weights DATA",
        "--model swin_unet --width 12 --size 72",
        "--model swin_unet --width 12 --encoder-weights none.pt",
        "--model resnet_unet --width 8 --encoder-weights DATA",
        "--steps 0",
        "--batch 0",
        "--batch 1000000000",
        "--batch-unlabeled 1000000000",
        "--foreground -1",
        "--foreground 0.5",
        "--optimizer x",
        "--lr 11",
        "--flip D,H",
        "--flip HW",
        "--flip H,,W",
        "--eval-every 0",
        "--unlabeled none.h5",
        "--unlabeled VOLUMES",
        "--cache disk",
        "--workers -1",
        "--seed 1.5",
        "--qar-share 0",
        "--clip nan",
        "--weight-power -1",
    ],
    "evaluate.py": [
        "--split nowhere",
        "--split unlabeled",
        "--baseline none",
        "--baseline none.pt",
        "--regions whole",
        "--regions whole=1,9",
        "--second none.pt",
        "--second none.pt --qp QP",
        "--qp none.pt",
        "--predict --second RUN --qp QP",
        "--predict --baseline supervised",
        "--stride 8",
        "--window whole",
        "--blend uniform",
        "--batch 0",
        "--workers -1",
        "--pictures -1",
        "--weights both",
        "--second RUN --qp QP",
    ],
}
VOLUME_FLAGS = {
    "corrupt.py": ["--size 8", "--size 16,16", "--size 1000,1000,1000", "--size 16,16,16,16"],
    "train_ssl.py": [
        "--size 16 --stride 17",
        "--size 16 --stride 8,8",
        "--size 16 --stride 0",
        "--size 32 --qar 1 --qp QP",
        "--size 16,8,16",
    ],
    "evaluate.py": ["--stride 17", "--stride 8,8", "--stride 99,1,1", "--window half"],
}


# --------------------------------------------------------------------------------------- the corpus


def arguments(stage, base, out, data=None, **files):
    """A run of a stage that would do little if its input were good."""
    data, own = (
        str(data or base / "data.h5"),
        {"vqm": base / "vqm/vqm.h5", "run": base / "run/best.pt", "qp": base / "qp/qp.pt"} | files,
    )
    size = "32" if base.name == "2d" else "16,32,32"
    return {
        "corrupt.py": [
            data,
            "--out",
            out,
            "--size",
            size,
            "--masks",
            "2",
            "--val-masks",
            "1",
            "--patches",
            "1",
            "--harvest-epochs",
            "1",
            "--harvest-steps",
            "1",
            "--labeled",
            "3",
            "--folds",
            "1",
            "--harvest-batch",
            "2",
        ],
        "train_qp.py": [
            data,
            "--vqm",
            str(own["vqm"]),
            "--out",
            out,
            "--width",
            "2",
            "--members",
            "1",
            "--epochs",
            "1",
            "--per-image",
            "1",
            "--amp",
            "off",
        ],
        "train_ssl.py": [
            data,
            "--out",
            out,
            "--size",
            size,
            "--steps",
            "1",
            "--batch",
            "2",
            "--batch-unlabeled",
            "2",
            "--width",
            "2",
            "--labeled",
            "3",
            "--amp",
            "off",
        ],
        "evaluate.py": [data, str(own["run"]), "--out", out, "--pictures", "0", "--amp", "off"],
        "data.h5": [data],
    }[stage]


def corpus(folder=Path("base"), everything=False):
    """Yields (stage, name, make, words, loose). Makes nothing itself: the names are known at once.

    make(work) writes the input and gives the arguments; words: what the message must hold; loose:
    the input may also be good enough to work with.
    everything: each input at all places that read it, not at one of them in turn.
    """
    flat, deep = folder / "2d", folder / "3d"

    def taken(inputs, place, places):
        return [
            (name, change)
            for i, (name, change) in enumerate(inputs)
            if everything or i % places == place
        ]

    def quick(stage):
        """Of train_qp.py no flipped bits: where nobody reads them, it trains for seconds."""
        return (
            broken.items()
            if everything or stage != "train_qp.py"
            else [(n, c) for n, c in broken.items() if n not in FLIPS]
        )

    def altered(source, change, path):
        if change is None:
            return path
        if isinstance(change, type(Path())):
            path.mkdir()
        else:
            path.write_bytes(change(source.read_bytes()))
        return path

    def edited(source, change, path):
        shutil.copy(source, path)
        with h5py.File(path, "a") as f:
            change(f)
        return path

    def locked(path):
        shutil.copy(flat / "data.h5", path)
        held.append(open(path, "r+b"))  # until this process ends
        fcntl.flock(held[-1], fcntl.LOCK_EX)
        return path

    held = []
    for stage in (*STAGES, "data.h5") if everything else ("corrupt.py", "data.h5"):
        yield (
            stage,
            "data, locked by another process",
            lambda work, s=stage: arguments(s, flat, str(work / "out"), locked(work / "bad.h5")),
            ["bad.h5", "another process"],
            False,
        )
    windowed = lambda work: edited(
        flat / "data.h5", attr("/", "standardize", False), work / "bad.h5"
    )
    plain = lambda work, stage, data=None: arguments(stage, flat, str(work / "out"), data)
    yield (
        "evaluate.py",
        "data, intensities of a window",
        lambda work: plain(work, "evaluate.py", windowed(work)),
        ["bad.h5", "convert"],
        False,
    )
    yield (
        "train_ssl.py",
        "unlabeled, intensities of a window",
        lambda work: [*plain(work, "train_ssl.py"), "--unlabeled", str(windowed(work))],
        ["bad.h5", "convert"],
        False,
    )

    broken = {"missing": None, "a folder": Path(), **BYTES, **FLIPS}
    for place, stage in enumerate((*STAGES, "data.h5")):
        for name, change in taken(quick(stage), place, 8):
            yield (
                stage,
                f"data, {name}",
                lambda work, s=stage, c=change: arguments(
                    s, flat, str(work / "out"), altered(flat / "data.h5", c, work / "bad.h5")
                ),
                ["bad.h5"],
                name in FLIPS,
            )
    for place, stage in enumerate(STAGES):
        for name, change in taken(DATASETS.items(), place, 4):
            if (name, stage) not in NOT_READ:
                yield (
                    stage,
                    f"data, {name}",
                    lambda work, s=stage, c=change: arguments(
                        s, flat, str(work / "out"), edited(flat / "data.h5", c, work / "bad.h5")
                    ),
                    ["bad.h5"],
                    False,
                )
    for name, change in taken(quick("train_qp.py"), 0, 2):
        yield (
            "train_qp.py",
            f"vqm, {name}",
            lambda work, c=change: arguments(
                "train_qp.py",
                flat,
                str(work / "out"),
                vqm=altered(flat / "vqm/vqm.h5", c, work / "bad.h5"),
            ),
            ["bad.h5"],
            name in FLIPS,
        )
    for base, table in ((flat, VQM), (deep, VQM3D)):
        for name, change in table.items():
            yield (
                "train_qp.py",
                f"vqm of {base.name}, {name}",
                lambda work, b=base, c=change: arguments(
                    "train_qp.py",
                    b,
                    str(work / "out"),
                    vqm=edited(b / "vqm/vqm.h5", c, work / "bad.h5"),
                ),
                ["bad.h5"],
                False,
            )

    def used(kind):
        """Where a checkpoint of a kind goes: (stage, arguments of its path)."""
        if kind == "run":
            yield (
                "evaluate.py",
                lambda work, path: arguments("evaluate.py", flat, str(work / "out"), run=path),
            )
        else:
            yield (
                "train_ssl.py",
                lambda work, path: [
                    *arguments("train_ssl.py", flat, str(work / "out")),
                    "--qp",
                    str(path),
                    "--qar",
                    "0.1",
                ],
            )
            yield (
                "evaluate.py",
                lambda work, path: [
                    *arguments("evaluate.py", flat, str(work / "out")),
                    "--qp",
                    str(path),
                ],
            )

    for place, (kind, source, table) in enumerate(
        (("run", flat / "run/best.pt", SSL), ("qp", flat / "qp/qp.pt", QP))
    ):
        for stage, argv in [*used(kind)][:1]:
            for name, change in taken(broken.items(), place, 2):
                yield (
                    stage,
                    f"{kind}, {name}",
                    lambda work, a=argv, c=change, s=source: a(
                        work, altered(s, c, work / "bad.pt")
                    ),
                    ["bad.pt"],
                    name in FLIPS,
                )
            for name, write in taken(
                [*FILES.items(), *((n, saved(c)) for n, c in table.items())], place, 2
            ):

                def make(work, a=argv, w=write, s=source):
                    w(s, work / "bad.pt", folder / "exploded")
                    return a(work, work / "bad.pt")

                yield stage, f"{kind}, {name}", make, ["bad.pt"], False
        others = {
            "a weak network": flat / "vqm/weak/fold0_epoch01.pt",
            "of volumes": deep / source.parent.name / source.name,
            "a dataset": flat / "data.h5",
            "of the other stage": flat / ("qp/qp.pt" if kind == "run" else "run/best.pt"),
            "last.pt of the other stage": flat / ("qp/last.pt" if kind == "run" else "run/last.pt"),
        }
        for stage, argv in used(kind):
            for name, path in others.items():
                yield (
                    stage,
                    f"{kind}, {name}",
                    lambda work, a=argv, p=path: a(work, p),
                    [path.name],
                    False,
                )

    for place, (stage, source) in enumerate(
        (("train_ssl.py", flat / "run"), ("train_qp.py", flat / "qp"))
    ):
        for name, change in taken(
            [
                *((n, c) for n, c in broken.items() if n not in ("missing", "a folder")),
                *LAST.items(),
                *FILES.items(),
            ],
            2 * place,
            4,
        ):

            def make(work, s=stage, f=source, c=change, n=name):
                (work / "out").mkdir()
                if n in FILES:
                    c(f / "last.pt", work / "out/last.pt", folder / "exploded")
                elif n in LAST:
                    saved(c)(f / "last.pt", work / "out/last.pt", None)
                else:
                    altered(f / "last.pt", c, work / "out/last.pt")
                return [*arguments(s, flat, str(work / "out")), "--resume"]

            yield stage, f"last.pt, {name}", make, ["last.pt"], name in FLIPS

    def filled(words, base, work):
        names = {
            "DATA": base / "data.h5",
            "VOLUMES": deep / "data.h5",
            "OUT": work / "out",
            "TMP": work,
            "QP": base / "qp/qp.pt",
            "RUN": base / "run/best.pt",
        }
        return [
            str(names[w]) if w in names else w.replace("DATA/", f"{base / 'data.h5'}/")
            for w in words
        ]

    for place, stage in enumerate(STAGES):
        needed = {"train_qp.py": ["--vqm", str(flat / "vqm/vqm.h5")]}.get(stage, [])
        for name, (argv, word) in taken(COMMON.items(), place, 4):
            run = (
                [str(flat / "run/best.pt")] if stage == "evaluate.py" and name != "no data" else []
            )
            yield (
                stage,
                f"options, {name}",
                lambda work, a=argv, r=run, n=needed: filled(
                    [*a[:1], *r, *a[1:], *n] if r else [*a, *n], flat, work
                ),
                [word.replace("DATA", "data.h5")],
                False,
            )
        for base, table in ((flat, MORE), (deep, VOLUME_FLAGS)):
            for line, _ in taken([(line, None) for line in table.get(stage, [])], place % 4, 4):
                yield (
                    stage,
                    f"options, {base.name}, {line}",
                    lambda work, s=stage, b=base, line=line: [
                        *arguments(s, b, str(work / "out")),
                        *filled(line.split(), b, work),
                    ],
                    [word_of(line)],
                    False,
                )
    yield from converters()


def word_of(line):
    """What the message on a line of options must name: the file of the last one, or that option."""
    files = {"none.pt": "none.pt", "none.h5": "none.h5", "VOLUMES": "3d/data.h5"}
    option, value = [w for w in line.split() if w.startswith("--")][-1], line.split()[-1]
    if line in ("--second none.pt", "--baseline none.pt", "--second none.pt --qp QP"):
        return {"--second none.pt --qp QP": "none.pt"}.get(line, option)
    return (
        {
            "--split unlabeled": "'unlabeled'",
            "--predict --second RUN --qp QP": "--predict",
            "--size 32 --qar 1 --qp QP": "qp.pt",
            "--qp none.pt --qar 1": "none.pt",
            "--second RUN --qp QP": "--second",
            "--head scalar --width 8 --encoder-weights DATA": "data.h5",
            "--model resnet_unet --width 8 --encoder-weights DATA": "data.h5",
            "--encoder-weights DATA": "--encoder-weights",
            "--model swin_unet --width 12 --size 72": "--model swin_unet",
            "--model unetpp --encoder resnet9": "resnet9",
        }.get(line)
        or files.get(value)
        or option
    )


def converters():
    """Two dozen for the converters."""

    def pictures(change):
        def make(work):
            for name in ("images", "masks"):
                (work / "src" / name).mkdir(parents=True)
                for i in range(4):
                    cv2.imwrite(
                        str(work / "src" / name / f"p{i}.png"),
                        np.full((16, 16), 255 * (name == "masks") if i else 0, np.uint8),
                    )
            change(work / "src")
            return [str(work / "src"), "--out", str(work / "out.h5"), "--val", "0.5"]

        return make

    for name, change, word in (
        ("a picture is text", lambda s: (s / "images/p1.png").write_text("x"), "p1.png"),
        ("a picture is empty", lambda s: (s / "images/p1.png").write_bytes(b""), "p1.png"),
        (
            "a mask is cut",
            lambda s: (s / "masks/p1.png").write_bytes((s / "masks/p1.png").read_bytes()[:40]),
            "p1.png",
        ),
        (
            "a mask of another size",
            lambda s: cv2.imwrite(str(s / "masks/p1.png"), np.zeros((9, 9), np.uint8)),
            "p1.png",
        ),
        (
            "a picture of two pages",
            lambda s: cv2.imwritemulti(str(s / "images/p4.tif"), [np.eye(16)] * 2),
            "p4.tif",
        ),
        (
            "a picture with NaN",
            lambda s: cv2.imwrite(str(s / "images/p4.tif"), np.full((16, 16), np.nan)),
            "p4.tif",
        ),
        (
            "a transparent picture",
            lambda s: cv2.imwrite(str(s / "images/p1.png"), np.full((16, 16, 4), 128, np.uint8)),
            "p1.png",
        ),
        (
            "a mask of 0, 1 and void",
            lambda s: cv2.imwrite(
                str(s / "masks/p1.png"),
                np.repeat(np.uint8([0, 0, 1, 255]), 4) + np.zeros((16, 1), np.uint8),
            ),
            "255",
        ),
        (
            "a transparent mask",
            lambda s: cv2.imwrite(str(s / "masks/p1.png"), np.full((16, 16, 4), 128, np.uint8)),
            "p1.png",
        ),
        (
            "a mask of class numbers as JPEG",
            lambda s: (
                (s / "masks/p1.png").unlink(),
                cv2.imwrite(str(s / "masks/p1.jpg"), np.eye(16)),
            ),
            "p1.jpg",
        ),
        (
            "pictures of 2 x 2",
            lambda s: [
                cv2.imwrite(str(s / n / "p1.png"), np.zeros((2, 2), np.uint8))
                for n in ("images", "masks")
            ],
            "p1",
        ),
        (
            "a name with a newline",
            lambda s: [(s / n / "p1.png").rename(s / n / "p\n1.png") for n in ("images", "masks")],
            "printable",
        ),
        ("no pictures", lambda s: [p.unlink() for p in s.rglob("*.png")], "src"),
    ):
        yield "data.images", name, pictures(change), [word], False
    for name, argv, word in (("missing", ["none"], "none"), ("a file", ["DATA"], "data.h5")):
        for stage in ("data.images", "data.nifti", "data.ssl4mis"):
            yield (
                stage,
                name,
                lambda work, a=argv: [
                    *(str(work / "data.h5") if x == "DATA" else x for x in a),
                    "--out",
                    str(work / "out.h5"),
                ],
                [word],
                False,
            )

    def volumes(change):
        def make(work):
            for name in ("imagesTr", "labelsTr"):
                (work / "src" / name).mkdir(parents=True)
            change(work / "src")
            return [str(work / "src"), "--out", str(work / "out.h5")]

        return make

    def header_alone(src):
        header = nibabel.Nifti1Header()
        header.set_data_shape((32767, 32767, 32767)), header.set_data_dtype(np.uint8)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        for folder in ("imagesTr", "labelsTr"):
            (src / folder / "a.nii").write_bytes(header.binaryblock + bytes(4096))

    yield "data.nifti", "more voxels than there are", volumes(header_alone), ["a.nii"], False
    for name, content in (
        ("text", b"no image"),
        ("empty", b""),
        ("gzip of nothing", bytes.fromhex("1f8b08000000000000ff03000000000000000000")),
    ):
        yield (
            "data.nifti",
            name,
            volumes(
                lambda s, c=content: [
                    (s / d / "a.nii.gz").write_bytes(c) for d in ("imagesTr", "labelsTr")
                ]
            ),
            ["a.nii.gz"],
            False,
        )

    def listed(content, lines="a\n"):
        def make(work):
            for name in "ab":
                (work / "src" / name).mkdir(parents=True)
                (work / "src" / name / "mri_norm2.h5").write_bytes(content)
            (work / "src/train.list").write_text(lines), (work / "src/val.list").write_text("b\n")
            return [str(work / "src"), "--out", str(work / "out.h5")]

        return make

    yield "data.ssl4mis", "a volume is text", listed(b"no HDF5"), ["a/mri_norm2.h5"], False
    yield (
        "data.ssl4mis",
        "a list names nobody",
        listed(b"", "nobody\n"),
        ["train.list", "nobody"],
        False,
    )
    yield from wrong_labels()
    yield from wrong_channels()


def write_tiff(path, image, extra=0, **tags):
    """(H, W, C) as a TIFF of several gray samples.

    extra: what it says of those beyond the first; tags: others, as in t262=2
    """
    packed = np.ascontiguousarray(image).tobytes()
    bits, kind = image.itemsize * 8, {"u": 1, "i": 2, "f": 3}[image.dtype.kind]
    H, W, C = image.shape
    found = {256: [W], 257: [H], 258: [bits] * C, 259: [1], 262: [1], 273: [8], 277: [C]}
    found |= {278: [H], 279: [len(packed)], 284: [1], 338: [extra] * (C - 1), 339: [kind] * C}
    found |= {int(name[1:]): [value] for name, value in tags.items()}
    start = 8 + len(packed) + len(packed) % 2
    head = b"II*\0" + start.to_bytes(4, "little") + packed
    path.write_bytes(head.ljust(start, b"\0") + pixels.directory(found, "<", start))
    return path


def wrong_channels():
    """Cases of several channels that are no case of these."""
    noise = np.random.default_rng(0).integers(0, 200, (6, 10, 12)).astype(np.int16)
    label = np.resize(np.uint8([0, 0, 1]), (6, 10, 12))
    table = {"channel_names": {"0": "T2", "1": "CT"}, "labels": {"background": 0, "x": 1}}

    def put(path, array, **place):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(place.get("spacing", (1.0, 1.0, 1.0)))
        image.SetOrigin(place.get("origin", (0.0, 0.0, 0.0)))
        sitk.WriteImage(image, str(path))

    def four(path, count):
        volumes = [sitk.GetImageFromArray(noise + i) for i in range(count)]
        sitk.WriteImage(sitk.JoinSeries(volumes), str(path))

    def volumes(change, options):
        def make(work):
            src = work / "src"
            for name in ("imagesTr", "labelsTr"):
                (src / name).mkdir(parents=True)
            for name in "ab":
                for c in range(2):
                    put(src / f"imagesTr/{name}_{c:04d}.nii", noise + c)
                put(src / f"labelsTr/{name}.nii", label)
            (src / "dataset.json").write_text(json.dumps(table))
            change(src)
            return [str(src), "--out", str(work / "out.h5"), *options.split()]

        return make

    def in_4d(*counts):
        def change(src):
            for name, count in zip("ab", counts):
                for path in (src / "imagesTr").glob(f"{name}_*"):
                    path.unlink()
                four(src / f"imagesTr/{name}.nii", count)

        return change

    def said(**more):
        return lambda src: (src / "dataset.json").write_text(json.dumps(table | more))

    def moved(**place):
        return lambda src: put(src / "imagesTr/b_0001.nii", noise, **place)

    case_b = ["case 'b', channel 1 (CT)", "b_0001.nii"]
    modality = {"channel_names": None, "modality": ["MR"]}
    for name, change, options, words in (
        (
            "a channel is missing",
            lambda s: (s / "imagesTr/b_0001.nii").unlink(),
            "",
            ["case 'b' has no channel 1"],
        ),
        (
            "a channel too many",
            lambda s: put(s / "imagesTr/b_0002.nii", noise),
            "",
            ["case 'a' has no channel 2"],
        ),
        (
            "a channel of another size",
            (lambda s: put(s / "imagesTr/b_0001.nii", noise[:5])),
            "",
            [*case_b, "size", "resample channel 1 to channel 0"],
        ),
        ("a channel elsewhere", moved(origin=(0.0, 5.0, 0.0)), "", [*case_b, "origin"]),
        ("a channel of other voxels", moved(spacing=(1.0, 1.0, 2.0)), "", [*case_b, "spacing"]),
        (
            "a channel is the label",
            lambda s: put(s / "imagesTr/b_0001.nii", label),
            "",
            ["case 'b', channel 1 (CT)", "is the label itself", "b.nii"],
        ),
        (
            "4D in files of channels",
            lambda s: four(s / "imagesTr/b_0001.nii", 2),
            "",
            ["b_0001.nii", "4D"],
        ),
        ("other numbers of volumes", in_4d(2, 3), "", ["b.nii", "holds 3 volumes", "a.nii"]),
        ("volumes that are times", in_4d(65, 65), "", ["holds 65 volumes", "at most 64"]),
        ("names of other channels", in_4d(3, 3), "", ["dataset.json", "names channels 0, 1"]),
        ("channels without names", said(channel_names=["T2", "CT"]), "", ["dataset.json"]),
        ("a name of a channel is a number", said(channel_names={"0": 1}), "", ["dataset.json"]),
        ("names by letters", said(channel_names={"a": "T2"}), "", ["dataset.json"]),
        ("modality is a list", said(**modality), "", ["dataset.json"]),
        ("--channel that is not there", said(), "--channel 0,2", ["no channel 2"]),
        ("--channel twice", said(), "--channel 1,1", ["--channel", "comes twice"]),
        ("--channel of a text", said(), "--channel T2", ["--channel"]),
        ("--clip of no channel", said(), "--clip MR=0,9", ["--clip", "'MR'", "T2, CT"]),
        ("--clip by name of one", said(), "--clip CT=0,9 --channel 1", ["--clip", "'CT'"]),
        ("--clip twice", said(), "--clip CT=0,9;CT=1,2", ["--clip", "two windows"]),
        ("--clip from high to low", said(), "--clip CT=9,0", ["--clip", "lower"]),
        ("--clip of all that are MR", said(), "--clip 0,9", ["--clip", "--intensity ct"]),
    ):
        # argparse's own lines end with --help, after a semicolon
        yield "data.nifti", f"channels, {name}", volumes(change, options), words, False

    gray = np.random.default_rng(1).integers(0, 256, (16, 16), np.uint8)
    five = np.dstack([gray] * 5)

    def pictures(change, options="--channels a,b"):
        def make(work):
            for folder in ("a", "b", "images", "masks"):
                (work / "src" / folder).mkdir(parents=True)
                for i in range(3):
                    path = work / "src" / folder / f"p{i}.png"
                    cv2.imwrite(str(path), np.eye(16) * 255 if folder == "masks" else gray)
            change(work / "src")
            argv = [str(work / "src"), "--out", str(work / "out.h5"), "--val", "0"]
            return [*argv, *options.split()]

        return make

    def tiffs(*images, **tags):
        def change(src):
            for i, image in enumerate(images):
                (src / f"images/p{i}.png").unlink()
                write_tiff(src / f"images/p{i}.tif", image, **tags)

        return change

    colored = np.dstack([gray, gray, 255 - gray])
    deflated = dict(t259=8)
    for name, change, options, words in (
        (
            "a channel is missing",
            lambda s: (s / "b/p1.png").unlink(),
            "--channels a,b",
            ["case 'p1' has no channel b"],
        ),
        (
            "the first channel is missing",
            lambda s: (s / "a/p1.png").unlink(),
            "--channels a,b",
            ["case 'p1' has no channel a"],
        ),
        (
            "a channel of another size",
            lambda s: cv2.imwrite(str(s / "b/p1.png"), gray[:9]),
            "--channels a,b",
            ["b/p1.png", "16 x 9", "a/p1.png"],
        ),
        (
            "a colored channel",
            lambda s: cv2.imwrite(str(s / "b/p1.png"), colored),
            "--channels a,b",
            ["b/p1.png", "colored"],
        ),
        ("one folder", str, "--channels a", ["--channels"]),
        ("a folder twice", str, "--channels a,a", ["--channels"]),
        ("a folder elsewhere", str, "--channels a,../b", ["--channels"]),
        ("masks as a channel", str, "--channels a,masks", ["--channels", "truth"]),
        ("no such folders", str, "--channels c,d", ["src/c"]),
        ("--channels and --gray", str, "--channels a,b --gray", ["--channels"]),
        ("--channels of a preset", str, "--channels a,b --preset ph2", ["--channels"]),
        ("TIFFs of 5 and 4", tiffs(five, five, five[..., :4]), "", ["p2.tif", "has 4 channels"]),
        (
            "a TIFF of 5 beside gray",
            tiffs(five),
            "",
            ["p0.tif", "is gray or RGB", "has 5 channels"],
        ),
        ("TIFFs of 5 as gray", tiffs(five, five, five), "--gray", ["--gray", "5 channels"]),
        ("65 channels", tiffs(*[np.dstack([gray] * 65)] * 3), "", ["out.h5", "64 channels"]),
        ("an alpha of 2", tiffs(five[..., :2], extra=1), "", ["p0.tif", "2 channels"]),
        ("4 that may be RGBA", tiffs(five[..., :4], t262=2), "", ["p0.tif", "4 channels"]),
        ("5 with an alpha", tiffs(five, extra=2), "", ["p0.tif", "5 channels"]),
        ("turned", tiffs(five, five, five, t274=6), "", ["src/images/p", "orientation 6"]),
        ("damaged", tiffs(five, five, five, **deflated), "", ["src/images/p", "not a readable"]),
        ("JPEG", tiffs(five, five, five, t259=7), "", ["src/images/p", "compressed", "TIFF 7"]),
        ("floats in steps", tiffs(five, five, five, t317=3), "", ["src/images/p", "predictor"]),
        (
            "NaN",
            tiffs(*[np.where(five > 250, np.nan, five).astype(np.float32)] * 3),
            "",
            ["src/images/p", "NaN"],
        ),
        (
            "a mask of 5",
            lambda s: write_tiff(s / "masks/p1.tif", five) and (s / "masks/p1.png").unlink(),
            "",
            ["masks/p1.tif", "5 channels"],
        ),
    ):
        yield "data.images", f"channels, {name}", pictures(change, options), words, False

    def brats(*images, labels=None):
        """data/ID.h5 of some images; labels: of each, None: without"""

        def make(work):
            src = work / "src"
            (src / "data").mkdir(parents=True)
            for i, image in enumerate(images):
                with h5py.File(src / f"data/c{i}.h5", "w") as f:
                    f["image"] = image
                    if labels is not None:
                        f["label"] = labels
            (src / "train.txt").write_text("c0\n")
            (src / "val.txt").write_text("c1,0.5\n")
            return [str(src), "--out", str(work / "out.h5")]

        return make

    many = np.random.default_rng(2).random((4, 10, 12, 9))
    cube, whole = np.resize(many, (9,) * 4), np.resize(np.uint8([0, 0, 1]), (10, 12, 9))
    for name, make, words in (
        ("a cube of channels", brats(cube, cube, labels=whole[:9, :9, :9]), ["c0.h5", "axis"]),
        ("an axis nobody knows", brats(np.resize(many, (9, 10, 12, 9)), many), ["c0.h5", "axis"]),
        ("other channels", brats(many, many[:3], labels=whole), ["c1.h5", "3 channel", "c0.h5"]),
        ("a label of another shape", brats(many, many, labels=whole[1:]), ["c0.h5", "(9, 12, 9)"]),
        ("a case that is not there", brats(many, labels=whole), ["val.txt", "c1", "data/c1.h5"]),
    ):
        yield "data.ssl4mis", f"channels, {name}", make, words, False


def wrong_labels():
    """Labels and lists that cannot be followed (of others, see test_labels.py)."""

    def left_atria(label=None, lists=None, image=None):
        def make(work):
            for name in "abc":
                (work / "src" / name).mkdir(parents=True)
                with h5py.File(work / "src" / name / "mri_norm2.h5", "w") as f:
                    f["image"] = np.zeros((16, 16, 9)) if image is None else image
                    f["label"] = np.resize([0, 1], (16, 16, 9)) if label is None else label
            for name, content in ({"train": b"a\nb\n", "val": b"c\n"} | (lists or {})).items():
                (work / "src" / f"{name}.list").write_bytes(content)
            return [str(work / "src"), "--out", str(work / "out.h5")]

        return make

    for name, label in (
        ("texts", np.full((16, 16, 9), b"x")),
        ("of another shape", np.zeros((16, 16, 8))),
    ):
        yield "data.ssl4mis", f"labels {name}", left_atria(label), ["a/mri_norm2.h5"], False
    yield (
        "data.ssl4mis",
        "gray levels beyond 32 bits",
        left_atria(image=np.resize(2**31 + np.arange(9), (16, 16, 9))),
        ["a/mri_norm2.h5", "float32 cannot hold or tell apart"],
        False,
    )
    for name, content in (
        ("twice in a list", b"a\nb\na/mri_norm2.h5\n"),
        ("in two lists", b"a\nc\n"),
    ):
        word = "train.list" if name == "twice in a list" else "val.list"
        yield "data.ssl4mis", f"a name {name}", left_atria(lists={"train": content}), [word], False
    for name, content in (("in cp1252", "\u00e4\n".encode("cp1252")), ("of bytes", b"a\0b\n")):
        yield (
            "data.ssl4mis",
            f"a list {name}",
            left_atria(lists={"train": content}),
            ["train.list"],
            False,
        )

    def volumes(values, table=None):
        def make(work):
            for folder, array in (
                ("imagesTr", np.arange(500.0).reshape(5, 10, 10)),
                ("labelsTr", np.resize(values, (5, 10, 10))),
            ):
                (work / "src" / folder).mkdir(parents=True)
                for name in "ab":
                    sitk.WriteImage(
                        sitk.GetImageFromArray(array), str(work / "src" / folder / f"{name}.nii")
                    )
            if table is not None:
                (work / "src/dataset.json").write_bytes(table)
            return [str(work / "src"), "--out", str(work / "out.h5")]

        return make

    yield "data.nifti", "labels 0 alone", volumes(np.uint8([0])), ["labelsTr"], False
    for name, table in (
        ("not UTF-8", b'{"labels": {"\xe4": 0}}'),
        ("nested", b"[" * 100_000),
    ):
        yield (
            "data.nifti",
            f"dataset.json, {name}",
            volumes(np.uint8([0, 1]), table),
            ["dataset.json"],
            False,
        )
    yield (
        "data.nifti",
        "a value that dataset.json does not name",
        volumes(np.uint8([0, 2]), b'{"labels": {"background": 0, "a": 1}}'),
        ["labelsTr/", "2"],
        False,
    )


def names():
    return [f"{stage}: {name}" for stage, name, *_ in corpus()]


def run_all(folder, everything=False):
    """Runs the corpus in a folder.

    -> a dict for each input: stage, name, code, error, seconds, peak, changed, words, loose,
    exploded
    """
    torch.set_num_threads(1), cv2.setNumThreads(1)
    # rendering takes seconds
    figures.save_figure = lambda figure, path: figures.pyplot().close(figure)
    folder = Path(folder).resolve()
    make_base(folder)
    for i, (stage, name, make, words, loose) in enumerate(corpus(folder, everything)):
        work = folder / "work" / str(i)
        work.mkdir(parents=True)
        argv = [str(a) for a in make(work)]
        before = listing(work)
        code, error, seconds, peak = in_child(stage, argv, folder / "log")
        yield dict(
            stage=stage,
            name=name,
            code=code,
            error=error.replace(f"{folder}/", "").replace(f"work/{i}/", ""),
            seconds=seconds,
            peak=peak,
            changed=listing(work) != before,
            words=words,
            loose=loose,
            exploded=(folder / "exploded").exists(),
        )
        shutil.rmtree(work)


def faults(found):
    """What is wrong with the answer to an input. -> [text, ...]"""
    error = found["error"]
    if found["loose"] and found["code"] == 0:
        return []
    return [
        text
        for text, wrong in (
            (f"exit code {found['code']}", found["code"] != 2),
            (f"{error.count(chr(10))} lines", error.count("\n") != 1),
            ("a traceback", "Traceback" in error),
            (
                f"not named: {[w for w in found['words'] if w not in error]}",
                any(w not in error for w in found["words"]),
            ),
            (
                "no remedy",
                ";" not in error
                and not found["name"].startswith("options")
                and found["name"] != "data, no label in val",
            ),
            ("unprintable", not error.rstrip("\n").isprintable()),
            ("too long", len(error) > 700),
            ("something was written", found["changed"]),
            (f"{found['peak'] / 1e9:.1f} GB", found["peak"] > 2e9),
            ("it went off", found["exploded"]),
        )
        if wrong
    ]


def table(results):
    """Markdown: a row per stage, and every input with its message."""
    stages = {}
    for r in results:
        stages.setdefault(r["stage"], []).append(r)
    yield (
        "| stage | inputs | clear refusals | worked (flipped bits that nobody reads) | slowest, s "
        "| most memory, MB |\n|---|---|---|---|---|---|"
    )
    for stage, mine in stages.items():
        refused = sum(r["code"] == 2 and not faults(r) for r in mine)
        worked = sum(r["code"] == 0 for r in mine)
        seconds = max(r["seconds"] for r in mine)
        peak = max(r["peak"] for r in mine) / 1e6
        yield f"| {stage} | {len(mine)} | {refused} | {worked} | {seconds:.1f} | {peak:.0f} |"
    for stage, mine in stages.items():
        yield f"\n## {stage}\n\n| input | what is said |\n|---|---|"
        for r in mine:
            name = r["name"].encode("unicode_escape").decode()
            said = r["error"].strip().replace("|", "\\|").replace(f"{stage}: error: ", "")
            said = said or "(works)"
            if faults(r):
                said = f"FAULT {faults(r)} {said[-300:]}"
            yield f"| {name} | {said} |"


def main(argv):
    folder = Path(argv[0]) if argv else Path(tempfile.mkdtemp())
    try:
        results = list(run_all(folder, everything=not argv))
    finally:
        if not argv:
            shutil.rmtree(folder)
    if argv:
        Path(argv[1]).write_text(json.dumps(results))
    else:
        print("# Bad inputs, and what the stages say\n")
        print("Each must end with exit code 2 and one line.\n")
        print("\n".join(table(results)))


if __name__ == "__main__":
    main(sys.argv[1:])
