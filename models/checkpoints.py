"""Checkpoints of all stages: saving and loading them, resuming a run, and the networks they hold.

A checkpoint is a dict of plain containers, numbers and tensors. It holds all that rebuilds its
network: weights, the network's name and options (model), the options of the run (args), what the
run knew of its data (data, see h5.Info.describe()) and the train cases that it has learned from
(labeled). last.pt also holds what --resume needs. A file that a user gives may come from anybody:
load_checkpoint() unpickles nothing, and says in one line what is wrong.
"""

import errno
import os
import re
import warnings
import zipfile
from typing import NamedTuple

import torch

import models
from data import files, h5, loading, prepared
from data.files import FORMAT, InputError
from models import distributed
from models.device import fused

# Raised when a training step computes something else. A run is resumed only under the number that
# it began with.
TRAINING = 2

# ------------------------------------------------------------------------------ saving and loading


def save_checkpoint(path, stage, **state):
    """Writes a checkpoint of `stage`, a key of HOLDS, whole or not at all.

    state: plain containers, numbers and tensors.
    """
    head = dict(format=FORMAT, training=TRAINING, stage=stage, torch=str(torch.__version__))
    with files.replacing(path) as temporary:
        try:
            torch.save(head | state, temporary)
        except RuntimeError as error:  # all that torch says of a failed write
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "") from None


# What readers of a checkpoint count on. "args/size" is the entry "size" of the dict "args".
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
SSL = {
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
}
QP = {
    "weights": dict,
    "epoch": int,
    "args/size": (int, tuple, type(None)),
    "best/epoch": int,
}
HOLDS = {  # of each stage
    "weak": {"weights": dict},
    "corrupt": {"args": dict, "data": dict, "fold": int, "inputs": dict, "finished": bool},
    "qp": MODEL | QP,
    "ssl": MODEL | SSL,
}
RESUMES = {  # last.pt holds these, too
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
}


def load_checkpoint(path, stage):
    """The dict that save_checkpoint() wrote, on the CPU.

    InputError if it is missing, damaged, of another stage, or not what HOLDS and RESUMES say.
    """
    state = _load(path)
    known = isinstance(state, dict) and isinstance(state.get("format"), int)
    if not known or state["format"] != FORMAT:
        raise InputError(
            f"{path}: not a checkpoint of this project (format {FORMAT}); make it again"
        )
    if state.get("stage") != stage:
        raise InputError(
            f"{path}: a checkpoint of stage {state.get('stage')!a:.40}, but '{stage}' is needed "
            "here; give one of that stage"
        )
    holds = HOLDS[stage]
    if os.path.basename(path) == "last.pt":
        holds = holds | RESUMES.get(stage, {})
    for name, kind in holds.items():
        value = state
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = "missing" if value is None else f"of type {type(value).__name__}"
            raise InputError(f"{path}: {name} is {found}; make the checkpoint again")
    return state


def _load(path):
    """What a file holds for torch. InputError if it cannot be read."""
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: {files.absent(path, 'checkpoint')}; give the .pt of a finished stage"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not compare checksums
                raise zipfile.BadZipFile("wrong checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it all
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the file holds, it is the file that is wrong
        if failed := files.unreadable(path, error):
            raise failed from None
        why = f"not a readable checkpoint ({type(error).__name__}); make it again"
        if files.kind_of(path) == files.HDF5:
            why = "an HDF5 file, not a checkpoint; give the .pt of a finished stage"
        raise InputError(f"{path}: {why}") from None


# ---------------------------------------------------------------------------------- resuming a run


def lock_folder(out):
    """The lock on a folder that exists. Nobody else writes to it while the lock is kept.

    A folder that is not there yet is not made: the input may still be refused.
    """
    if distributed.rank() == 0 and os.path.isdir(out):
        return files.claim(out)
    return None


class Own(NamedTuple):
    """What tells the files of a stage's run from others."""

    names: str  # a regular expression
    stages: tuple  # of its checkpoints
    head: bytes = b""  # log.csv begins like this


EVENTS = r"events\.out\.tfevents\..*"
OWN = {
    "ssl": Own(rf"(last|best|step\d+)\.pt|log\.csv|{EVENTS}", ("ssl",), b"step,loss,sup,"),
    "qp": Own(rf"(last|qp)\.pt|qp\.(md|json|png)|log\.csv|{EVENTS}", ("qp",), b"step,loss,lr,"),
    "corrupt": Own(r"(last|fold\d+_epoch\d+)\.pt", ("corrupt", "weak")),
}


def files_of_run(stage, folder):
    """The files in a folder that have names of a run's. -> paths, last.pt first

    Without last.pt, the others are no run.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    own = [name for name in names if re.fullmatch(OWN[stage].names, name)]
    return [os.path.join(folder, name) for name in sorted(own, key=lambda n: (n != "last.pt", n))]


def start_run(stage, args, data, *, inputs=(), free=(), defaults=None, folder=None):
    """Looks at last.pt in a folder (default: --out) before a run. -> state, sums

    state: to resume from, or of a run that is finished (state["finished"]); None: a fresh start.
    sums: {option: CRC-32 of the file that it names, or None}, for the state's "inputs".

    data: describes the data now. inputs: options that name other files, which may be elsewhere now,
    but must be the same. free: options that may differ. defaults: {option: value} of those that a
    run may be too old to know.

    InputError if the folder holds an unfinished run and neither --resume nor --overwrite is given,
    or a run that was started with other data, files or options; or where a fresh start would remove
    what this run reads, or what is of another stage or program.
    """
    folder = folder or args.out
    last = os.path.join(folder, "last.pt")
    sums = {name: files.checksum(getattr(args, name)) for name in inputs}
    if args.resume and args.overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it: choose one")
    former = files_of_run(stage, folder)
    empty = not any(path.endswith(".pt") for path in former)
    killed_early = not os.path.isfile(last) and rows_of_log(folder) < 2
    if args.overwrite or (empty or args.resume) and killed_early:
        _check_former(stage, former, args)
        return None, sums
    if not os.path.isfile(last):
        again = "--resume or --overwrite" if killed_early else "--overwrite"
        raise InputError(
            f"{folder}: holds a run, or its log, but no last.pt; begin again with {again}, or "
            "choose another --out"
        )
    state = load_checkpoint(last, stage)
    if not state["finished"] and state.get("training") != TRAINING:
        raise InputError(
            f"{last}: was started by another version, whose losses are others; {REPLACE}"
        )
    young = _younger(state["args"], vars(args), defaults or {})
    _check_same_run(last, state, args, data, sums, {*free, *young})
    if not args.resume and not state["finished"]:
        raise InputError(
            f"{args.out}: holds an unfinished run; go on with --resume, replace it with "
            "--overwrite, or choose another --out"
        )
    return state, sums


def _check_former(stage, former, args):
    """InputError if a file that a fresh start removes is read by this run, or is of others."""
    given = {key: v for key, v in vars(args).items() if isinstance(v, str) and os.path.isfile(v)}
    for path in filter(os.path.isfile, former):  # not links to what is gone
        for key, value in given.items():
            if os.path.samefile(path, value):
                option = key if key == "data" else "--" + key.replace("_", "-")
                raise InputError(
                    f"{value}: {option} is a file of the run that this one would replace; choose "
                    "another --out"
                )
        if not _is_own(stage, path):
            raise InputError(
                f"{path}: is of another stage or program, and would be replaced; choose another "
                "--out"
            )


def _is_own(stage, path):
    """Whether a file that has a name of a run's is of a run of this stage.

    A checkpoint says its stage. The head of log.csv tells it for all other files. A file that is
    damaged, or an empty log, may come from a run that was killed.
    """
    if path.endswith(".pt"):
        try:
            state = _load(path)
        except InputError:
            return True  # damaged
        return isinstance(state, dict) and state.get("stage") in OWN[stage].stages
    log, last = (os.path.join(os.path.dirname(path), name) for name in ("log.csv", "last.pt"))
    if not os.path.isfile(log):  # a run writes it before its events
        return os.path.isfile(last) or not re.fullmatch(EVENTS, os.path.basename(path))
    with open(log, "rb") as f:
        head = f.readline()
    return head == b"" or head.startswith(OWN[stage].head)


def rows_of_log(folder):
    """How many rows log.csv has; a run that was killed before its first last.pt has one at most."""
    path = os.path.join(folder, "log.csv")
    if not os.path.isfile(path):
        return 0
    with open(path, "rb") as f:
        return max(0, sum(1 for _ in f) - 1)


REPLACE = "replace it with --overwrite, or choose another --out"
ELSEWHERE = {"resume", "overwrite", "out", "data", "device"}  # options that may always differ
VAL_OPTIONS = ("window", "stride", "blend")  # of train_ssl.py: how val is seen
MAY_CHANGE = ("keep", "cache", "workers", *VAL_OPTIONS)  # of train_ssl.py: where a run resumes


def _younger(before, now, defaults):
    """Options that a run is too old to know, and that are off, or at their default, now."""
    new = now.keys() - before.keys()
    return {name for name in new if not now[name] or now[name] == defaults.get(name)}


def _check_same_run(last, state, args, data, sums, free):
    """InputError unless a run was started with these options, data and files."""
    for key, value in vars(args).items():
        if key in ELSEWHERE or key in sums or key in free:
            continue
        found = state["args"].get(key)
        if found != value:
            then, now = (given(key, v) for v in (found, value))
            raise InputError(f"{last}: was started {then}, not {now}; give the same, or {REPLACE}")
    for key, value in data.items():
        found = state["data"].get(key, value)  # older runs know less of their data
        if found != value:
            raise InputError(
                f"{last}: was started on other data ({key} {found}, not {value}); {REPLACE}"
            )
    for key, value in sums.items():
        if state["inputs"].get(key) != value:
            raise InputError(
                f"{last}: was started with another file as --{key} than {getattr(args, key)} is "
                f"now; {REPLACE}"
            )


def given(key, value):
    """An option of a run, in words."""
    option = f"--{key.replace('_', '-')}"
    if value is None or value is False:
        return f"without {option}"
    if isinstance(value, (tuple, list)):
        value = ",".join(map(str, value))
    return f"with {option}" if value is True else f"with {option} {value}"


def check_finite(parts, names, nets, step, advice):
    """InputError if a number of some steps, or a weight, is not finite.

    Called before anything is saved, so that files keep the last good state.
    parts [n, len(names)]: of the n steps up to `step`; nets: whose weights are looked at;
    advice: {name: value of that step} -> what to try.
    """
    parts = parts.cpu()
    wrong = ~parts.isfinite().all(1)  # [n]
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        values = dict(zip(names, parts[row].tolist()))
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise InputError(
            f"step {step - len(parts) + 1 + row}: the loss is not finite ({terms}), nothing of it "
            f"was saved; {advice(values)}"
        )
    for net in nets:
        for name, value in net.state_dict().items():
            if not value.isfinite().all():
                raise InputError(
                    f"step {step}: weights are not finite ({name}), nothing of it was saved; "
                    f"{advice({})}"
                )


# --------------------------------------------------------------------- the networks of checkpoints


def load_run(path, weights, on):
    """The network of a checkpoint of train_ssl.py, ready to predict, and the checkpoint's dict.

    weights: "student" or "teacher". InputError if the checkpoint holds no such network.
    """
    state = load_checkpoint(path, "ssl")
    if not state["nets"]:
        raise InputError(f"{path}: nets is empty; train it again")
    chosen = state["nets"][0] if weights == "student" else state["teacher"]
    shape = loading.shape_of(state["args"]["size"])
    net = network_of(path, state, chosen, models.segmentation_networks(), on, shape)
    return net, state


def load_quality(path, info, on, size=None, runs=None):
    """The frozen quality predictor of train_qp.py, and the train cases that it has learned from.

    InputError if it was trained for other classes, channels or intensities, or for patches of
    another size than `size`, those of f: it would see them at another scale.
    runs: {path: args} of each f; a note says where its --flip is another than that of g. Another
    note says that g has learned nothing, where train_qp.py has found so.
    """
    state = load_checkpoint(path, "qp")
    if "optimizer" in state:
        raise InputError(f"{path}: is for train_qp.py --resume; give the qp.pt beside it")
    check_kind(path, state["data"], info, "train g on this data")
    patch = tuple(state.get("patch") or ())
    if info.dims == 3 and size is not None and patch != tuple(size):
        raise InputError(
            f"{path}: has learned from patches of {','.join(map(str, patch))}, but f sees "
            f"{','.join(map(str, size))}; give corrupt.py and f the same --size"
        )
    check_trained_size(path, info, state["model"].get("size"))
    if not state["weights"].get("temperature", torch.ones(())) > 0:
        raise InputError(f"{path}: its temperature is not above 0; train it again")
    # for new images, f's checkpoint stands for the data
    remedy = None if info.splits else "give a g that has learned from data like those of f"
    prepared.check({info.path: info.describe()}, {path: state["data"]}, remedy)
    flips = [flip_of(run, info, args) for run, args in (runs or {}).items()]
    note_other_flips(path, "g has", flip_of(path, info, state["args"]), "f", flips)
    if state.get("blind") is True:  # files of earlier versions do not say
        print(f"note: {path}: this g hardly tells good from bad masks of val; see its qp.md")
    names = [name for name in models.NETWORKS if name.startswith("quality")]
    g = fused(network_of(path, state, state["weights"], names, on))
    return g.requires_grad_(False), state["labeled"]


def check_dense(g, path, asks):
    """InputError if g, of a file, has a scalar head. asks: the option that asks about pixels."""
    if not hasattr(g, "belief"):
        raise InputError(
            f"{path}: has a scalar head, which knows nothing of pixels; {asks} needs "
            "train_qp.py --head dense"
        )


def check_kind(path, data, info, remedy):
    """InputError where `data`, of a checkpoint, differs from info in what a network depends on."""
    theirs = data | {"channel_names": h5.names_of(data)}
    for key in ("classes", "channels", "channel_names", "dims"):
        ours = getattr(info, key)
        if theirs[key] != ours and not (key == "channel_names" and info.channels == 1):
            raise InputError(
                f"{path}: trained for {key} {theirs[key]!s:.300}, but {info.path} has {ours}; "
                f"{remedy}"
            )


def note_other_flips(path, who, flip, whom, flips):
    """Prints a note where one of `flips`, those of `whom`, is not that of `who`, of a file."""
    others = [other for other in flips if other != flip]
    if others:
        words = {None: "all axes", "none": "no axis"}
        print(
            f"note: {path}: {who} seen flips along {words.get(flip, flip)}, but {whom} along "
            f"{words.get(others[0], others[0])}; train both with the same --flip"
        )


def network_of(path, state, weights, names, on, shape=None):
    """The network of a checkpoint on the device, in eval mode.

    names: of networks, one of which it must be; shape: of a grid that it must take, or None.
    InputError if it is none of these, or not made for the data of the checkpoint.
    """
    config, data = state["model"], state["data"]
    if not models.one_of(config["name"], names):
        raise InputError(
            f"{path}: holds a network '{config['name'][:40]}', but one of {', '.join(names)} is "
            "needed here; train it again"
        )
    needed = dict(channels=data["channels"], classes=len(data["classes"]), dims=data["dims"])
    for key, value in needed.items():
        if config[key] != value:
            raise InputError(
                f"{path}: its network is for {key} {config[key]}, its data have {value}; train it "
                "again"
            )
    try:
        net = models.rebuild(config, weights)
        if shape:
            models.check(config, shape)
        return on.place(net).eval()
    except Exception as error:  # whatever the file holds, it is the file that is wrong
        text = " ".join(str(error).split())[:300]
        raise InputError(
            f"{path}: its weights and its model do not fit ({text}); train it again"
        ) from None


def load_encoder(net, source):
    """models.load_encoder(), whose errors are an InputError. -> a line: what was left out"""
    try:
        return models.load_encoder(net, source)
    except Exception as error:  # whatever the file holds, it is the user's file that is wrong
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        raise InputError(f"--encoder-weights {source}: {' '.join(text.split())[:600]}") from None


def flip_of(path, info, args):
    """--flip of a checkpoint's args, as h5.check_flip() gives it. InputError if it is none."""
    try:
        return h5.check_flip(info, args.get("flip"))
    except InputError as error:
        raise InputError(f"{path}: {error}; train it again") from None


def check_trained_size(path, info, size):
    """InputError unless a checkpoint's size is one that --size would take for this data."""
    sides = (size,) if isinstance(size, int) else size
    whole = isinstance(sides, tuple) and all(isinstance(side, int) for side in sides)
    flat = isinstance(size, int)
    if flat != (info.dims == 2) or not whole or len(sides) != (1 if info.dims == 2 else 3):
        raise InputError(
            f"{path}: its size is {size!a:.60}, but {info.path} is segmented in {info.dims}D; "
            "train it again"
        )
    try:
        loading.check_size(info, sides)
    except InputError as error:
        raise InputError(f"{path}: {error}; train it again") from None
