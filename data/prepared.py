"""How images were prepared: what a dataset and checkpoints say of it, compared.

`prepared` of data/h5.py says which converter made a dataset, and with which options.
"""

import shlex
from collections import defaultdict

from data.files import InputError

CLEARLY = 1.5  # ratio of sides from which on voxels are of another size


def check(known, others, remedy=None):
    """Compares how the images of `others` were prepared with the first of `known` that says it.

    known, others: {path: what Info.describe() says}; of known, the first is the dataset.
    remedy: what to do, where the first of `known` is no dataset that could be converted again.
    InputError if intensities or axes mean something else. A note, once, on other differences, on a
    window that one side does not know, and on voxels of clearly another size. Where one side says
    nothing, as older files and checkpoints do, only `standardize` is compared.
    """
    first = next(iter(known))
    path = next((p for p, data in known.items() if _prepared(data)), first)
    notes = defaultdict(list)
    for other, data in others.items():
        for name in dict.fromkeys((first, path)):
            _check_intensities(other, data, name, known[name], first, remedy)
            notes[_differences(data, known[name]), name].append(other)
        ours, theirs = (_text(_prepared(d).get("axes") or "") for d in (known[path], data))
        if ours and theirs and ours != theirs:
            raise InputError(
                f"{other}: D, H and W of its images point along the body axes "
                f"{theirs}, but those of {path} along {ours}; "
                + (remedy or f"convert {first} again with --axes {theirs}")
            )
    for ((theirs, ours), name), paths in notes.items():
        more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        alike = "one --spacing" if "voxels" in theirs else "the same options"
        if theirs:
            print(
                f"note: images were prepared differently: {theirs} for {paths[0]}{more}, but "
                f"{ours} for {name}; convert both with {alike}"
            )


def _check_intensities(other, theirs, name, ours, dataset, remedy):
    """InputError unless the intensities of `other` mean what those of `name` do."""
    options, wanted = _intensities(theirs), _intensities(ours)
    known = options and wanted
    if _standardize(theirs) == _standardize(ours) and not (known and options != wanted):
        return
    if name != dataset:
        remedy = "leave one of them out"
    again = f"convert {dataset} again with {options}" if options else "convert both alike"
    raise InputError(
        f"{other}: its images were {_words_of(theirs)}, but those of {name} were "
        f"{_words_of(ours)}; {remedy or again}"
    )


def _prepared(data):
    """What describe() says of the preparation, {} for nothing. It may come from anybody."""
    found = data.get("prepared")
    return found if isinstance(found, dict) else {}


def _standardize(data):
    """Whether readers standardize images, or a list: of each channel."""
    found = data.get("standardize", True)  # older checkpoints do not say
    return found if found is False or isinstance(found, list) else True


def _intensities(data):
    """The options of data.nifti that bring images to these intensities; "" where nobody knows."""
    prepared = _prepared(data)
    if "window" not in prepared:
        return ""
    if prepared["window"] is None:
        return "--intensity mr"
    manner = "mr" if _by_channel(prepared) else "ct"
    return f"--intensity {manner} --clip {shlex.quote(_windows(prepared))}"


def _by_channel(prepared):
    """The window of each channel, some of which are None; [] for one window of all."""
    window = prepared["window"]
    usable = isinstance(window, (list, tuple)) and isinstance(prepared.get("names"), (list, tuple))
    return (
        window if usable and any(v is None or isinstance(v, (list, tuple)) for v in window) else []
    )


def _windows(prepared):
    """The window of CT as --clip takes it, or the windows of those channels that have one."""
    if not (windows := _by_channel(prepared)):
        return _text(prepared["window"], ",")
    pairs = zip(prepared["names"], windows)
    return ";".join(f"{_text(n)}={_text(w, ',')}" for n, w in pairs if w is not None)[:200]


def _words_of(data):
    """How intensities were brought to a scale, in words."""
    if _prepared(data).get("window") is not None:
        several = "s" if _by_channel(_prepared(data)) else ""
        return f"clipped to the window{several} {_windows(_prepared(data))}"
    if _standardize(data) is True:
        return "standardized case by case"
    return f"brought to an unknown window (standardize {_text(_standardize(data), ', ')})"


def _voxels(data):
    """mm per axis that describe() says, () for nothing."""
    found = data.get("spacing")
    if isinstance(found, list) and all(type(mm) is float and mm > 0 for mm in found):
        return found
    return ()


def _differences(*both):
    """What both sides state but that differs, as two texts; empty ones if nothing does."""

    def stated(value):
        return _text(0 if value is None else value)  # channel: none is the first

    a, b = map(_prepared, both)
    free = {"window", "nnunet"}  # the window is compared already; nnunet is how files are named
    keys = [k for k in a if k in b and k not in free and stated(a[k]) != stated(b[k])]
    joined = {"channel": ",", "names": ", "}
    texts = [[f"{_text(k)} {_text(p[k], joined.get(k, ' x '))}" for k in keys] for p in (a, b)]
    windows = list(map(_intensities, both))
    if any(windows) and not all(windows) and _standardize(both[0]) is not True:
        texts = [[*text, _words_of(data)] for text, data in zip(texts, both)]
    if any(max(x, y) > CLEARLY * min(x, y) for x, y in zip(*map(_voxels, both))):
        texts = [[*text, f"voxels of {_text(_voxels(d))} mm"] for text, d in zip(texts, both)]
    return tuple(map(", ".join, texts))


def _text(value, joined=" x "):
    """A value of `prepared`, a plain one or a list of them, in at most 60 printable characters."""
    parts = value[:10] if isinstance(value, (list, tuple)) else [value]
    text = joined.join(map(_plain, parts))
    return "".join(c if c.isprintable() else "?" for c in text)[:60]


def _plain(value):
    if value is None:
        return "none"
    if type(value) in (int, float):
        return f"{value:g}" if abs(value) < 1e15 else "beyond all numbers"
    return str(value)[:60] if isinstance(value, (str, bool)) else "?"
