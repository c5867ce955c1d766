"""Checkpoints: saving, checked loading, resuming a run, and the networks that they hold."""

import errno
import glob
import os
import warnings
import zipfile

import torch

import models
from data import files, h5, loading
from data.files import FORMAT, InputError
from models.device import fused

TRAINING = 2  # raised when a training step computes something else; a run is resumed only under the number that it began with


def save_checkpoint(path, stage, **state):
    """Writes a checkpoint of `stage` ("weak", "qp", "ssl"): plain containers, numbers and tensors only."""
    with files.replacing(path) as temporary:
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
        raise InputError(
            f"{path}: {files.absent(path, 'checkpoint')}; give the .pt of a finished stage"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # older formats of torch.load are not even looked at
            if (
                any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist())
                or archive.testzip()
            ):
                raise zipfile.BadZipFile("compressed, or of a wrong checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the file holds, it is the file that is wrong
        if found := files.unreadable(path, error):
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
    sums = {name: files.checksum(getattr(args, name)) for name in inputs}
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


def rebuild(path, state, weights, names, on, shape=None):
    """The network of a checkpoint on the device, in eval mode; InputError unless it is one of `names`, made for the data of the checkpoint, and
    takes a grid of `shape`."""
    config, data = state["model"], state["data"]
    if not models.one_of(config["name"], names):
        raise InputError(
            f"{path}: holds a network '{config['name'][:40]}', but one of {', '.join(names)} is needed here; train it again"
        )
    for key, value in dict(
        channels=data["channels"], classes=len(data["classes"]), dims=data["dims"]
    ).items():
        if config[key] != value:
            raise InputError(
                f"{path}: its network is for {key} {config[key]}, its data have {value}; train it again"
            )
    try:
        net = models.rebuild(config, weights)
        if shape:
            models.check(config, shape)
        return on.place(net).eval()
    except Exception as error:  # whatever the file holds, it is the file that is wrong
        raise InputError(
            f"{path}: its weights and its model do not fit ({' '.join(str(error).split())[:300]}); train it again"
        ) from None


def load_run(path, weights, on):
    """The network of a train_ssl.py checkpoint, ready to predict, and the checkpoint."""
    state = load_checkpoint(path, "ssl")
    if not state["nets"]:
        raise InputError(f"{path}: nets is empty; train it again")
    weights = state["nets"][0] if weights == "student" else state["teacher"]
    return rebuild(
        path,
        state,
        weights,
        models.segmentation_networks(),
        on,
        loading.shape_of(state["args"]["size"]),
    ), state


def load_encoder(net, source):
    """Published weights for a network's encoder (models.load_encoder), or an InputError. -> a line that says what was left out"""
    try:
        return models.load_encoder(net, source)
    except Exception as error:  # whatever the file holds, it is the user's file that is wrong
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        raise InputError(f"--encoder-weights {source}: {' '.join(text.split())[:600]}") from None


def load_quality(path, info, on, size=None, runs=None):
    """The frozen quality predictor of train_qp.py, and the names of the train cases whose labels it has learned from.

    InputError if it was trained for other classes, channels or intensities, or for patches of
    another size than `size`, those of f: it would see them at another scale.
    runs: {path: args} of each f; a note says where its --flip is another than that of g.
    """
    state = load_checkpoint(path, "qp")
    theirs, ours = state["data"], dict(classes=info.classes, channels=info.channels, dims=info.dims)
    for key, value in ours.items():
        if theirs[key] != value:
            raise InputError(
                f"{path}: trained for {key} {theirs[key]}, but {info.path} has {value}; train g on this data"
            )
    if info.dims == 3 and size is not None and tuple(state.get("patch") or ()) != tuple(size):
        theirs, ours = (",".join(map(str, s)) for s in (state.get("patch") or (), size))
        raise InputError(
            f"{path}: has learned from patches of {theirs}, but f sees {ours}; give corrupt.py and f the same --size"
        )
    check_size(path, info, state["model"].get("size"))
    if not state["weights"].get("temperature", torch.ones(())) > 0:
        raise InputError(f"{path}: its temperature is not above 0; train it again")
    h5.check_prepared({info.path: info.describe()}, {path: state["data"]})
    flip = flip_of(path, info, state["args"])
    flips = [flip_of(run, info, args) for run, args in (runs or {}).items()]
    if others := [other for other in flips if other != flip]:
        words = {None: "all axes", "none": "no axis"}
        print(
            f"note: {path}: g has seen flips along {words.get(flip, flip)}, but f along "
            f"{words.get(others[0], others[0])}; train both with the same --flip"
        )
    g = fused(
        rebuild(
            path,
            state,
            state["weights"],
            [name for name in models.NETWORKS if name.startswith("quality")],
            on,
        )
    )
    return g.requires_grad_(False), state["labeled"]


def flip_of(path, info, args):
    """--flip of a checkpoint's args, as h5.check_flip() gives it. InputError if it is none."""
    try:
        return h5.check_flip(info, args.get("flip"))
    except InputError as error:
        raise InputError(f"{path}: {error}; train it again") from None


def check_size(path, info, size):
    """InputError unless a checkpoint's size is one that --size would take for this data."""
    sides = (size,) if isinstance(size, int) else size
    whole = isinstance(sides, tuple) and all(isinstance(s, int) for s in sides)
    if isinstance(size, int) != (info.dims == 2) or not whole or len(sides) != info.dims * 2 - 3:
        raise InputError(
            f"{path}: its size is {size!a:.60}, but {info.path} is segmented in {info.dims}D; train it again"
        )
    try:
        loading.check_size(info, sides)
    except InputError as error:
        raise InputError(f"{path}: {error}; train it again") from None
