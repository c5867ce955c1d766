"""Bad inputs for all stages, made from small phantom datasets, each run in a process of its own.

    python tests/bad_inputs.py
        prints a table of the stages, and every input with what is said of it (Markdown)
    python tests/bad_inputs.py FOLDER FILE.json
        writes what the tests read, a part of the inputs: to run all takes minutes

What is asked of the answers is in test_bad_input.py. The scripts are imported once, and each input
is given to a forked child, so that one costs a fraction of a second, and a crash or a hang ends
nothing but the child.
"""

import contextlib
import copy
import fcntl
import functools
import json
import operator
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
from dataclasses import dataclass
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch
import torch._dynamo  # else each child imports it with its first optimizer, which takes seconds

sys.path.insert(0, str(Path(__file__).parent.parent))

from bad_sources import Input, converters

import corrupt
import evaluate
import train_qp
import train_ssl
from data import figures, h5, images, nifti, phantom, ssl4mis
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
DATA_READERS = (*STAGES, "data.h5")
A, V = "train/phantom000", "val/phantom004"  # cases that the stages read
BOTH, ANOTHER = (A, V), "train/phantom001"
EXPLODED = "exploded"  # what a bomb writes


# ---------------------------------------------------------------------------- one input, in a child


def in_child(stage, argv, log, limit=SECONDS):
    """Runs a stage, by its name in MAINS, as a script does.

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
            sys.argv = [stage, *argv]
            cli(lambda: MAINS[stage](argv))
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


# ------------------------------------------------------ bad files: write(good, bad), both are paths


def rewritten(change):
    """The bad file holds change(bytes of the good one)."""
    return lambda good, bad: bad.write_bytes(change(good.read_bytes()))


def edited(change):
    """The bad file is a copy in HDF5 that change(f) works on."""

    def write(good, bad):
        shutil.copy(good, bad)
        with h5py.File(bad, "a") as f:
            change(f)

    return write


@functools.cache
def loaded(path):
    return torch.load(path, weights_only=True)


def saved(change):
    """The bad file is the checkpoint change(state)."""
    return lambda good, bad: torch.save(change(copy.deepcopy(loaded(good))), bad)


HELD = []  # files that stay open until this process ends


def locked(good, bad):
    shutil.copy(good, bad)
    HELD.append(open(bad, "r+b"))
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)


BROKEN = {
    "missing": lambda good, bad: None,
    "a folder": lambda good, bad: bad.mkdir(),
    **{name: rewritten(change) for name, change in (BYTES | FLIPS).items()},
}


# --------------------------------------------------------- bad datasets: change(f), f the open file


def attr(path, name, value=None):
    """Another value of an attribute; None: without it."""

    def change(f):
        if value is None:
            del f[path].attrs[name]
        else:
            f[path].attrs[name] = value

    return change


def deleted(path):
    return lambda f: f.__delitem__(path)


def remade(path, make):
    """Another dataset in the place of one: what make(old) gives."""

    def change(f):
        new = make(f[path][()])
        del f[path]
        f[path] = new

    return change


def replaced(name, make):
    """The same in both cases."""
    return lambda f: [remade(f"{case}/{name}", make)(f) for case in BOTH]


def instead(path, put):
    """Something else in the place of a member: put(group, name)."""

    def change(f):
        group, name = f[path].parent, path.split("/")[-1]
        del group[name]
        put(group, name)

    return change


def member(path, value):
    """A value or a link in the place of a member."""
    return instead(path, lambda group, name: group.__setitem__(name, value))


def as_group(path):
    """An empty group in the place of a member."""
    return instead(path, lambda group, name: group.create_group(name))


def within(change, name):
    """Some pixels changed in place."""

    def go(f):
        for case in BOTH:
            value = f[case][name][()]
            change(value)
            f[case][name][...] = value

    return go


def pixel(value, name):
    return within(lambda pixels: pixels.__setitem__((0, 5, 5), value), name)


def huge(f, shape=(1000, 100_000, 100_000), **how):
    for case in BOTH:
        for name in ("image", "label"):
            del f[case][name]
            f[case].create_dataset(name, shape, "uint8", **how)


def sparse(f):
    """4 TiB of zeros that the file does hold, as a hole of its file system."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY), plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((1024, 65536, 65536))
    h5py.h5d.create(f.id, b"zeros", h5py.h5t.NATIVE_UINT8, space, plist)
    for case in BOTH:
        for name in ("image", "label"):
            del f[case][name]
            f[case][name] = f["zeros"]
    del f["zeros"]


def external(group, name):
    outside = [(str(Path(group.file.filename).with_suffix(".raw")), 0, 6400)]
    group.create_dataset(name, (4, 40, 40), "uint8", external=outside)


def virtual(group, name):
    layout = h5py.VirtualLayout((4, 40, 40), "float32")
    layout[:] = h5py.VirtualSource(".", f"{ANOTHER}/image", (4, 40, 40))
    group.create_virtual_dataset(name, layout)


def every(name, value):
    """All labels of a split are `value`, and checked as such."""

    def change(f):
        for case in f[name].values():
            case["label"][...] = value
            case.attrs["checksum"] = h5.checksum_of(case["image"][()], case["label"][()])

    return change


def unlabeled(split):
    return lambda f: [case.__delitem__("label") for case in f[split].values()]


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


def small(side):
    crop = lambda old: old[:, :side, :side]
    return lambda f: [replaced(name, crop)(f) for name in ("image", "label")]


DATASETS = {
    **{
        f"no attribute {name}": attr("/", name)
        for name in ("format", "name", "classes", "dims", "channels")
    },
    **{
        f"a case without attribute {name}": attr(A, name)
        for name in ("patient", "spacing", "spacing_known", "source")
    },
    "no attribute at all": lambda f: [f.attrs.__delitem__(name) for name in list(f.attrs)],
    "format is a text": attr("/", "format", "1"),
    "format 2": attr("/", "format", 2),
    "format is an array": attr("/", "format", [1, 1]),
    "classes is a text": attr("/", "classes", "background"),
    "classes are numbers": attr("/", "classes", [0, 1, 2, 3]),
    "classes is a scalar number": attr("/", "classes", 4),
    "no classes": attr("/", "classes", np.array([], h5py.string_dtype())),
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
    "mean is NaN": attr(A, "mean", np.nan),
    "std 0": attr(A, "std", 0.0),
    "std is negative": attr(A, "std", -1.0),
    "spacing is a text": attr(A, "spacing", "1 mm"),
    "spacing is NaN": attr(A, "spacing", [1.0, np.nan, 1.0]),
    "spacing 0": attr(A, "spacing", [1.0, 0.0, 1.0]),
    "spacing is negative": attr(A, "spacing", [1.0, -1.0, 1.0]),
    "spacing is infinite": attr(A, "spacing", [1.0, np.inf, 1.0]),
    "spacing of two axes": attr(A, "spacing", [1.0, 1.0]),
    "checksum is a text": attr(A, "checksum", "none"),
    "checksum of other pixels": lambda f: [attr(case, "checksum", 1)(f) for case in BOTH],
    "affine is a text": attr(A, "affine", "none"),
    "affine is NaN": attr(A, "affine", np.full((4, 4), np.nan)),
    "nifti_header is a text": attr(A, "nifti_header", "none"),
    "nifti_header without affine": attr(A, "nifti_header", np.zeros(348, np.uint8)),
    "source_label without source_grid": lambda f: f[A].__setitem__(
        "source_label", np.zeros((4, 40, 40), np.uint8)
    ),
    "source_label is a group": lambda f: f[A].create_group("source_label"),
    "source_grid of two axes": attr(A, "source_grid", [4, 4]),
    "no image": deleted(f"{A}/image"),
    "an empty case": as_group(A),
    "image is a group": as_group(f"{A}/image"),
    "label is a group": as_group(f"{A}/label"),
    "image is a type": member(f"{A}/image", np.dtype("uint8")),
    "a split is a dataset": member("train", np.zeros(3)),
    "a case is a dataset": member(A, np.zeros((9, 9))),
    **{
        f"image of {kind}": replaced("image", lambda old, kind=kind: old.astype(kind))
        for kind in ("float64", "int32", "float16", ">f4", "bool", "complex64")
    },
    "image of texts": replaced("image", lambda old: np.full(old.shape, b"x")),
    "image is compound": replaced(
        "image", lambda old: np.zeros(old.shape, [("a", "u1"), ("b", "u1")])
    ),
    "image is empty": member(f"{A}/image", h5py.Empty("float32")),
    "image is a number": replaced("image", lambda old: np.float32(1)),
    "image of no pixel": replaced("image", lambda old: old[:, :0]),
    "image of one axis": replaced("image", lambda old: old.ravel()),
    "image of five axes": replaced("image", lambda old: old[None, None]),
    "label of int64": replaced("label", lambda old: old.astype("int64")),
    "label of float32": replaced("label", lambda old: old.astype("float32")),
    "label of texts": replaced("label", lambda old: np.full(old.shape, b"x")),
    "label of another shape": replaced("label", lambda old: old[:, 1:]),
    "label of another rank": replaced("label", lambda old: old[0]),
    "image is NaN": pixel(np.nan, "image"),
    "image is infinite": pixel(-np.inf, "image"),
    "labels out of range": pixel(4, "label"),
    "label 255": pixel(255, "label"),
    "other pixels": pixel(0.25, "image"),
    "other labels": within(lambda label: label.fill(1), "label"),
    "1 x 1 pixel": small(1),
    "7 x 7 pixels": small(7),
    "all labels empty": every("train", 0),
    "no label in train": unlabeled("train"),
    "no label in val": unlabeled("val"),
    "no val": deleted("val"),
    "empty val": lambda f: [f["val"].__delitem__(name) for name in list(f["val"])],
    "one case": only(A),
    "nothing in it": only(),
    "val alone": only(V),
    "no split": lambda f: [f.__delitem__(split) for split in list(f)],
    "a patient in two splits": attr(V, "patient", "phantom000"),
    "sizes that are not there": lambda f: huge(f, chunks=(1, 1000, 1000), compression="gzip"),
    "sizes that are not there, contiguous": huge,
    "2 GB that are not there": lambda f: huge(f, (20, 10_000, 10_000), chunks=(1, 1000, 1000)),
    "4 TiB": sparse,
    "external storage": instead(f"{A}/image", external),
    "a virtual dataset": instead(f"{A}/image", virtual),
    "a soft link": member(f"{A}/image", h5py.SoftLink(f"/{ANOTHER}/image")),
    "a dangling link": member(f"{A}/label", h5py.SoftLink("/nowhere")),
    "a link to itself": member(A, h5py.SoftLink(f"/{A}")),
    "a split is a link": member("val", h5py.SoftLink("/test")),
    "an external link": member(A, h5py.ExternalLink("/etc/passwd", "/")),
    "a link to another file": member("train", h5py.ExternalLink("../2d/data.h5", "/train")),
    "a case that is its split": instead(A, lambda group, name: group.__setitem__(name, group)),
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


def entry(path, index, value):
    """Another value of one element of a dataset."""
    return lambda f: f[path].__setitem__(index, value)


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
    **{f"no {path}": deleted(path) for path in ("train", "val", "real", "train/mask", "val/dice")},
    **{f"no {path}": deleted(path) for path in ("real/at", "train/case", "train/prob")},
    "no val/prob_index": deleted("val/prob_index"),
    "mask is a group": as_group("train/mask"),
    "train is a dataset": member("train", np.zeros(3)),
    "mask of int32": remade("train/mask", lambda old: old.astype("int32")),
    "mask of float32": remade("val/mask", lambda old: old.astype("float32")),
    "mask of two axes": remade("train/mask", lambda old: old[:, 0]),
    "mask of four axes": remade("train/mask", lambda old: old[..., None]),
    "masks of 8 x 8": remade("train/mask", lambda old: old[:, :8, :8]),
    "masks that are no squares": remade("train/mask", lambda old: old[:, :, :31]),
    "mask of a class too many": entry("train/mask", (0, 0, 0), 4),
    "mask 255 in real": entry("real/mask", (0, 3, 3), 255),
    "dice above 1": entry("train/dice", (0, 0), 1.5),
    "dice below 0": entry("val/dice", (0, 0), -0.1),
    "dice is NaN": entry("real/dice", (0, 0), np.nan),
    "dice of other classes": remade("train/dice", lambda old: old[:, :1]),
    "dice of float64": remade("train/dice", lambda old: old.astype("float64")),
    "a case that does not exist": entry("train/case", 0, "nobody"),
    "a case of another split": entry("train/case", 0, "phantom004"),
    "an unlabeled case": entry("train/case", 0, "../../etc"),
    "case is a number": remade("train/case", lambda old: np.arange(len(old))),
    "at beyond the case": entry("train/at", (0, 0), 99),
    "at is negative": entry("val/at", (0, 0), -1),
    "at of three axes": remade("train/at", lambda old: np.repeat(old, 3, 1)),
    "a slice with more masks than others": entry("train/at", (0, 0), 1),
    "prob_index beyond": entry("train/prob_index", 0, 10**6),
    "prob_index below -1": entry("train/prob_index", 0, -2),
    "prob of other classes": remade("train/prob", lambda old: old[:, :1]),
    "prob of float32": remade("train/prob", lambda old: old.astype("float32")),
    "fewer dice than masks": remade("train/dice", lambda old: old[:-1]),
    "an empty split": lambda f: [
        remade(f"val/{name}", lambda old: old[:0])(f)
        for name in ("mask", "dice", "at", "case", "prob_index")
    ],
    "a soft link": member("train/mask", h5py.SoftLink("/val/mask")),
    "an external link": member("val", h5py.ExternalLink("data.h5", "/val")),
    "external storage": instead("train/mask", external),
    "mask declares 10 TB": instead(
        "train/mask",
        lambda group, name: group.create_dataset(
            name, (10**10, 32, 32), "uint8", chunks=(1, 32, 32)
        ),
    ),
}
VQM3D = {
    "at is negative": entry("train/at", (0, 0), -20),
    "at beyond the volume": entry("train/at", (0, 2), 30),
    "patches too small": lambda f: [
        remade(f"train/{name}", lambda old: old[..., :8])(f) for name in ("mask", "prob")
    ],
}


# ---------------------------------------------------------- bad checkpoints: change(state) -> state


def without(*path):
    def change(state):
        *outer, last = path
        del functools.reduce(operator.getitem, outer, state)[last]
        return state

    return change


def given(value, *path):
    def change(state):
        *outer, last = path
        functools.reduce(operator.getitem, outer, state)[last] = value
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
CHECKPOINTS = {  # None: SSL and QP say what
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

SSL = CHECKPOINTS | {
    "no nets": without("nets"),
    "nets is empty": given([], "nets"),
    "weights are a list": given([[1]], "nets"),
    "no teacher": without("teacher"),
    "model is one of another stage": given("quality_dense", "model", "name"),
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
    "model is one of another stage": given("unet", "model", "name"),
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


# --------------------------------------------- bad checkpoints: write(good, bad), with bombs or not


class Bomb:
    """Unpickled, it makes a file beside the folders of the good inputs."""

    def __init__(self, good):
        self.path = str(good.parents[2] / EXPLODED)

    def __reduce__(self):
        return open, (self.path, "w")


def legacy(good, bad):
    torch.save(loaded(good), bad, _use_new_zipfile_serialization=False)


def pickle_bomb(good, bad):
    torch.save(loaded(good) | dict(bomb=Bomb(good)), bad)


def legacy_bomb(good, bad):
    state = dict(format=1, stage="ssl", bomb=Bomb(good))
    torch.save(state, bad, _use_new_zipfile_serialization=False)


def plain_bomb(good, bad):
    bad.write_bytes(pickle.dumps(Bomb(good)))


def tar_bomb(good, bad):
    with tarfile.open(bad, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            part = bad.with_name(f"{bad.name}.{name}")
            plain_bomb(good, part)
            tar.add(part, name)
            part.unlink()


def zip_bomb(good, bad):
    with (
        zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
        new.open("archive/data.pkl", "w") as f,
    ):
        for _ in range(300):
            f.write(bytes(2**20))


def torch_script(good, bad):
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(bad)


FILES = {
    "legacy format": legacy,
    "a pickle bomb": pickle_bomb,
    "a pickle bomb in the legacy format": legacy_bomb,
    "a plain pickle bomb": plain_bomb,
    "a tar with a bomb": tar_bomb,
    "a zip bomb": zip_bomb,
    "an empty zip": lambda good, bad: zipfile.ZipFile(bad, "w").close(),
    "TorchScript": torch_script,
}


# -------------------------------------------------------------------------------------- bad options


def runs(text):
    """The options of each run; a bar or the end of a line parts them."""
    return [run.strip() for run in text.replace("|", "\n").splitlines() if run.strip()]


# DATA and the like stand for paths: see filled()
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
OPTIONS = {
    "corrupt.py": runs("""
        --labeled 0 | --labeled -1 | --labeled 1.5 | --labeled abc | --labeled 99
        --labeled 0.0001 | --labeled 1.e999 | --labeled nan
        --size 0 | --size 31 | --size 100000 | --size 32,32 | --size 16,16,16 | --size x
        --size 1e3
        --masks 0 | --masks 1000000000 | --val-masks -1
        --harvest-share 1.5 | --harvest-share nan
        --folds 0 | --folds 9
        --harvest-epochs 0 | --harvest-epochs 1,,2 | --harvest-epochs x
        --harvest-batch 0
        --workers 0 | --workers 1000000
        --seed -1 | --seed 99999999999999999999
        --preview DATA/x.png | --preview TMP | --preview /proc/x/y.png
        --patches 0
        --foreground 2 | --foreground 0.5
        --labeled-seed x
        --flip D | --flip X | --flip none,H
    """),
    "train_qp.py": runs("""
        --width 0 | --width 1000000000
        --members 0 | --members 1000000000
        --batch 1 | --batch 1000000000
        --lr -1 | --lr nan | --lr inf
        --ema 1 | --ema nan
        --soft 2
        --epochs 0
        --head other | --head scalar --width 4
        --encoder-weights DATA
        --head scalar --width 8 --encoder-weights none.pt
        --head scalar --width 8 --encoder-weights DATA
        --size 8 | --size 16,16,16 | --size 99999
        --select worst
        --resume --overwrite
        --flip D | --flip 1
        --mask-dropout -1
        --strength nan
        --per-image 0
        --patience 0
    """),
    "train_ssl.py": runs("""
        --labeled 0 | --labeled -1 | --labeled 1.5 | --labeled abc
        --qar 0.1 | --weight quality | --qp none.pt --qar 1
        --size 16,16,16 | --size 31 | --size 1000000
        --stride 16
        --window whole
        --keep garbage | --keep 0 | --keep 1,
        --resume --overwrite
        --lam nan | --lam -1 | --lam inf
        --conf-threshold 1.1
        --ema 1
        --mix-alpha 0
        --temperature 0
        --method nonsense
        --model transformer
        --width 0 | --width 100000
        --dropout 0.5
        --model unetpp --encoder resnet9
        --encoder resnet18
        --encoder-weights DATA
        --model swin_unet --width 12 --size 72
        --model swin_unet --width 12 --encoder-weights none.pt
        --model resnet_unet --width 8 --encoder-weights DATA
        --steps 0
        --batch 0 | --batch 1000000000 | --batch-unlabeled 1000000000
        --foreground -1 | --foreground 0.5
        --optimizer x
        --lr 11
        --flip D,H | --flip HW | --flip H,,W
        --eval-every 0
        --unlabeled none.h5 | --unlabeled VOLUMES
        --cache disk
        --workers -1
        --seed 1.5
        --qar-share 0
        --clip nan
        --weight-power -1
    """),
    "evaluate.py": runs("""
        --split nowhere | --split unlabeled
        --baseline none | --baseline none.pt
        --regions whole | --regions whole=1,9
        --second none.pt | --second none.pt --qp QP | --qp none.pt
        --predict --second RUN --qp QP | --predict --baseline supervised
        --stride 8
        --window whole
        --blend uniform
        --batch 0
        --workers -1
        --pictures -1
        --weights both
        --second RUN --qp QP
    """),
}
OPTIONS3D = {
    "corrupt.py": runs("--size 8 | --size 16,16 | --size 1000,1000,1000 | --size 16,16,16,16"),
    "train_qp.py": [],
    "train_ssl.py": runs("""
        --size 16 --stride 17 | --size 16 --stride 8,8 | --size 16 --stride 0
        --size 32 --qar 1 --qp QP
        --size 16,8,16
    """),
    "evaluate.py": runs("--stride 17 | --stride 8,8 | --stride 99,1,1 | --window half"),
}
SAID = {  # what the message on these lines must name: word_of()'s rule would be wrong
    "--second none.pt": "--second",
    "--baseline none.pt": "--baseline",
    "--second none.pt --qp QP": "none.pt",
    "--split unlabeled": "'unlabeled'",
    "--predict --second RUN --qp QP": "--predict",
    "--size 32 --qar 1 --qp QP": "qp.pt",
    "--qp none.pt --qar 1": "none.pt",
    "--second RUN --qp QP": "--second",
    "--head scalar --width 8 --encoder-weights DATA": "data.h5",
    "--model resnet_unet --width 8 --encoder-weights DATA": "data.h5",
    "--model swin_unet --width 12 --size 72": "--model swin_unet",
    "--model unetpp --encoder resnet9": "resnet9",
}


def word_of(line):
    """What the message on a line of options must name: the file at its end, or the last option."""
    *_, option = [word for word in line.split() if word.startswith("--")]
    files = {"none.pt": "none.pt", "none.h5": "none.h5", "VOLUMES": "3d/data.h5"}
    return SAID.get(line) or files.get(line.split()[-1]) or option


def filled(words, base, work):
    """Options, with paths in the place of the words that stand for them."""
    names = {
        "DATA": base / "data.h5",
        "VOLUMES": base.parent / "3d/data.h5",
        "OUT": work / "out",
        "TMP": work,
        "VQM": base / "vqm/vqm.h5",
        "QP": base / "qp/qp.pt",
        "RUN": base / "run/best.pt",
    }
    return [names.get(w) or w.replace("DATA/", f"{base / 'data.h5'}/") for w in words]


# ------------------------------------------------------------------------------ runs on a bad input

GOOD = {  # where the good file of each kind lies
    "data": "data.h5",
    "unlabeled": "data.h5",
    "vqm": "vqm/vqm.h5",
    "run": "run/best.pt",
    "qp": "qp/qp.pt",
}
LITTLE = {  # options with which a stage would do little, if its input were good
    "corrupt.py": "--size {size} --masks 2 --val-masks 1 --patches 1 --harvest-epochs 1"
    " --harvest-steps 1 --labeled 3 --folds 1 --harvest-batch 2",
    "train_qp.py": "--width 2 --members 1 --epochs 1 --per-image 1 --amp off",
    "train_ssl.py": "--size {size} --steps 1 --batch 2 --batch-unlabeled 2 --width 2 --labeled 3"
    " --amp off",
    "evaluate.py": "--pictures 0 --amp off",
}


def arguments(stage, base, work, **files):
    """A run of a stage; files: those given in the place of the good ones, by their kind in GOOD."""
    given = {kind: base / path for kind, path in GOOD.items()} | files
    if stage == "data.h5":
        return [given["data"]]
    own = {"train_qp.py": ["--vqm", given["vqm"]], "evaluate.py": [given["run"]]}.get(stage, [])
    size = "32" if base.name == "2d" else "16,32,32"
    argv = [given["data"], *own, "--out", work / "out", *LITTLE[stage].format(size=size).split()]
    if "unlabeled" in files:
        argv += ["--unlabeled", files["unlabeled"]]
    if "qp" in files:
        argv += ["--qp", files["qp"]]
        argv += ["--qar", "0.1"] if stage == "train_ssl.py" else []
    return argv


def bad_file(stage, base, kind, write):
    """make(work) of an Input: a run of a stage on what write(good, bad) makes of a good file."""
    good = base / GOOD[kind]

    def make(work):
        bad = work / f"bad{good.suffix}"
        write(good, bad)
        return arguments(stage, base, work, **{kind: bad})

    return make


def resumed(stage, base, kind, write):
    """make(work) of an Input: a run resumes from what write(good, bad) makes of its last.pt."""
    good = (base / GOOD[kind]).with_name("last.pt")

    def make(work):
        (work / "out").mkdir()
        write(good, work / "out/last.pt")
        return [*arguments(stage, base, work), "--resume"]

    return make


# --------------------------------------------------------------------------------------- the corpus


@dataclass
class Places:
    """Where the good inputs lie, and how many bad ones are made of them."""

    folder: Path
    everything: bool  # each input at all places that read it, not a part of that

    def __post_init__(self):
        self.flat, self.deep = self.folder / "2d", self.folder / "3d"

    def taken(self, inputs, first, of):
        """One in `of` of the inputs, from the `first` on; or everything."""
        return [x for i, x in enumerate(inputs) if self.everything or i % of == first]

    def broken(self, stage):
        """What a stage is given. No flipped bits to train_qp.py: unread, they cost seconds."""
        omitted = FLIPS if stage == "train_qp.py" and not self.everything else ()
        return [(name, write) for name, write in BROKEN.items() if name not in omitted]


def locked_data(places):
    """Data that another process holds."""
    for stage in DATA_READERS if places.everything else ("corrupt.py", "data.h5"):
        make = bad_file(stage, places.flat, "data", locked)
        yield Input(stage, "data, locked by another process", make, ["bad.h5", "another process"])


def windowed_data(places):
    """Data of other intensities than those of the checkpoint, or of the labeled data."""
    write = edited(attr("/", "standardize", False))
    for stage, kind in (("evaluate.py", "data"), ("train_ssl.py", "unlabeled")):
        make = bad_file(stage, places.flat, kind, write)
        yield Input(stage, f"{kind}, intensities of a window", make, ["bad.h5", "convert"])


def broken_data(places):
    """Data that is no file of HDF5, or a damaged one."""
    for place, stage in enumerate(DATA_READERS):
        for name, write in places.taken(places.broken(stage), place, 8):
            make = bad_file(stage, places.flat, "data", write)
            yield Input(stage, f"data, {name}", make, ["bad.h5"], name in FLIPS)


def wrong_data(places):
    """Data that does not keep the format."""
    for place, stage in enumerate(STAGES):
        for name, change in places.taken(DATASETS.items(), place, 4):
            if (name, stage) not in NOT_READ:
                make = bad_file(stage, places.flat, "data", edited(change))
                yield Input(stage, f"data, {name}", make, ["bad.h5"])


def bad_masks(places):
    """Files of masks and their quality: what corrupt.py writes and train_qp.py reads."""
    stage = "train_qp.py"
    for name, write in places.taken(places.broken(stage), 0, 2):
        make = bad_file(stage, places.flat, "vqm", write)
        yield Input(stage, f"vqm, {name}", make, ["bad.h5"], name in FLIPS)
    for base, table in ((places.flat, VQM), (places.deep, VQM3D)):
        for name, change in table.items():
            make = bad_file(stage, base, "vqm", edited(change))
            yield Input(stage, f"vqm of {base.name}, {name}", make, ["bad.h5"])


def bad_checkpoints(places, kind, stages, table, place):
    """Bad ones in the place of a run or of qp, at the first of its stages; others' ones, at all."""
    contents = [*FILES.items(), *((name, saved(change)) for name, change in table.items())]
    for inputs in (BROKEN.items(), contents):
        for name, write in places.taken(inputs, place, 2):
            make = bad_file(stages[0], places.flat, kind, write)
            yield Input(stages[0], f"{kind}, {name}", make, ["bad.pt"], name in FLIPS)
    other = "qp" if kind == "run" else "run"
    others = {
        "a weak network": places.flat / "vqm/weak/fold0_epoch01.pt",
        "of volumes": places.deep / GOOD[kind],
        "a dataset": places.flat / "data.h5",
        "of the other stage": places.flat / GOOD[other],
        "last.pt of the other stage": places.flat / other / "last.pt",
    }
    for stage in stages:
        for name, path in others.items():
            make = functools.partial(arguments, stage, places.flat, **{kind: path})
            yield Input(stage, f"{kind}, {name}", make, [path.name])


def bad_last(places):
    """Checkpoints of runs that are to resume."""
    broken = {n: write for n, write in BROKEN.items() if n not in ("missing", "a folder")}
    states = {name: saved(change) for name, change in LAST.items()}
    for place, stage, kind in ((0, "train_ssl.py", "run"), (2, "train_qp.py", "qp")):
        for name, write in places.taken((broken | states | FILES).items(), place, 4):
            make = resumed(stage, places.flat, kind, write)
            yield Input(stage, f"last.pt, {name}", make, ["last.pt"], name in FLIPS)


def common_options(places, place, stage):
    """Options that all stages have."""
    needed = ["--vqm", "VQM"] if stage == "train_qp.py" else []
    for name, (argv, word) in places.taken(COMMON.items(), place, 4):
        if stage == "evaluate.py" and name != "no data":
            argv = [argv[0], "RUN", *argv[1:]]
        make = functools.partial(filled, [*argv, *needed], places.flat)
        yield Input(stage, f"options, {name}", make, [word.replace("DATA", "data.h5")])


def own_options(places, place, stage):
    """Options of one stage, on slices and on volumes."""
    for base, table in ((places.flat, OPTIONS), (places.deep, OPTIONS3D)):
        for line in places.taken(table[stage], place, 4):
            make = lambda work, base=base, line=line: [
                *arguments(stage, base, work),
                *filled(line.split(), base, work),
            ]
            yield Input(stage, f"options, {base.name}, {line}", make, [word_of(line)])


def corpus(folder=Path("base"), everything=False):
    """Yields each Input. Makes nothing itself: the names are known at once.

    everything: each input at all places that read it, not at one of them in turn.
    """
    places = Places(folder, everything)
    for kind in (locked_data, windowed_data, broken_data, wrong_data, bad_masks):
        yield from kind(places)
    yield from bad_checkpoints(places, "run", ["evaluate.py"], SSL, 0)
    yield from bad_checkpoints(places, "qp", ["train_ssl.py", "evaluate.py"], QP, 1)
    yield from bad_last(places)
    for place, stage in enumerate(STAGES):
        yield from common_options(places, place, stage)
        yield from own_options(places, place, stage)
    yield from converters()


def names(everything=False):
    return [f"{bad.stage}: {bad.name}" for bad in corpus(everything=everything)]


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
    for i, bad in enumerate(corpus(folder, everything)):
        work = folder / "work" / str(i)
        work.mkdir(parents=True)
        argv = [str(a) for a in bad.make(work)]
        before = listing(work)
        code, error, seconds, peak = in_child(bad.stage, argv, folder / "log")
        yield dict(
            stage=bad.stage,
            name=bad.name,
            code=code,
            error=error.replace(f"{folder}/", "").replace(f"work/{i}/", ""),
            seconds=seconds,
            peak=peak,
            changed=listing(work) != before,
            words=bad.words,
            loose=bad.loose,
            exploded=(folder / EXPLODED).exists(),
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
