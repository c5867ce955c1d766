"""Which cases of a source are of one patient, and which split each of them belongs to."""

import glob
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import h5
from data.files import InputError, read_lists
from data.options import SEED, SHARE


class Row(NamedTuple):
    """One case of a source, before its files are read."""

    name: str
    image: Path
    mask: Path | None
    patient: str
    split: str | None  # None: the source does not say

    def case(self, src, image, label, **more):
        """What was read of it as an h5.Case. src: the folder of all; more: as h5.Case has it"""
        return h5.Case(
            split=self.split,
            name=self.name,
            image=image,
            label=label,
            patient=self.patient,
            source=plain_name(str(self.image.relative_to(src))),
            **more,
        )


# ------------------------------------------------------------------------------------ names


def plain_name(text):
    """A name as all names are compared: UTF-8 in any locale, accents composed (NFC).

    A Mac writes an accent as a character of its own (NFD), and lists may come from elsewhere.
    InputError for a file's name that is not UTF-8.
    """
    if not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text):
        try:  # Python has put these in place of bytes that it could not decode
            text = os.fsencode(text).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{ascii(text)}: a file's name is not UTF-8; rename it") from None
    return unicodedata.normalize("NFC", text)


def by_name(pairs):
    """{name: path} of (name, path), ....

    InputError if names differ by capitals alone, or not at all: such files would share a mask, or
    one would hide the other.
    """
    found, seen = {}, {}
    for name, path in pairs:
        if other := seen.get(name.lower()):
            raise InputError(
                f"{path}: {other.name if other.parent == path.parent else other} is there too; "
                "remove or rename one of the two"
            )
        found[name] = seen[name.lower()] = path
    return found


def below(folder, pattern):
    """Paths at any depth of a folder, sorted. Path.rglob() passes over folders that are links."""
    return sorted(folder / p for p in glob.iglob(f"**/{pattern}", root_dir=folder, recursive=True))


def is_file(path):
    """Whether a path is a file; no folder, and no pipe, which would be read forever.

    A link that leads nowhere counts, since its reader refuses it.
    """
    return path.is_file() or not path.exists()


IGNORED = {".txt", ".csv", ".md", ".db", ".ini"}  # lists and notes; Thumbs.db and desktop.ini


def note_unread(folders, is_read, kinds):
    """A note where some folders hold files and folders that are not read.

    is_read: of a path; kinds: endings of what is read, in words
    """
    found = [p for folder in folders for p in sorted(folder.iterdir()) if p.name[0] != "."]
    unread = [p for p in found if not (is_read(p) or p.suffix.lower() in IGNORED)]
    if unread:
        print(
            f"note: {len(unread)} of {len(found)} files and folders are not read, such as "
            f"{unread[0]}; only files of these kinds are: {kinds}"
        )


OF_MASKS = re.compile(r"(?i).+[_-](seg|segmentation|mask|label|labels|gt)")  # names


def note_masks(paths):
    """A note where images without a mask, {name: path}, have names of masks."""
    if masks := [name for name in paths if OF_MASKS.fullmatch(name)]:
        print(
            f"note: {len(masks)} of {len(paths)} files have names of masks, such as "
            f"{paths[masks[0]]}; they are taken for images, so move them elsewhere if they are none"
        )


# ------------------------------------------------------------------------------------ splits


def add_options(p):
    """The options of converters that say which split each case belongs to."""
    add_patient(p)
    p.add_argument(
        "--lists",
        metavar="DIR",
        help="folder with train.txt, val.txt, test.txt; default: SRC, if it has them",
    )
    where = "of the patients, where no list and no folder says which"
    p.add_argument("--val", type=SHARE, help=f"share for val {where} (default: {DRAW['val']})")
    p.add_argument("--test", type=SHARE, help=f"share for test {where} (default: {DRAW['test']})")
    p.add_argument("--seed", type=SEED, help=f"of the split by patient (default: {DRAW['seed']})")


DRAW = dict(val=0.2, test=0.0, seed=0)  # how patients are drawn where no option says it


def find_lists(args):
    """train.txt, val.txt, test.txt, unlabeled.txt of --lists or SRC. -> {split: [names]}

    Gives the options of DRAW their values, and keeps in args.given which of them were given.
    """
    args.given = [f"--{name}" for name in DRAW if getattr(args, name) is not None]
    vars(args).update({name: v for name, v in DRAW.items() if getattr(args, name) is None})
    if args.val + args.test >= 1:
        raise InputError("--val and --test are shares that must leave something to train on")
    folder = Path(args.lists or args.src)
    lists = read_lists({s: folder / f"{s}.txt" for s in h5.SPLITS}, plain_name)
    if args.lists and not lists:
        names = ", ".join(f"{s}.txt" for s in h5.SPLITS)
        raise InputError(f"--lists {args.lists}: none of {names} is there")
    if lists and not any(lists.values()):
        raise InputError(f"{folder}: {next(iter(lists))}.txt names no case; fill it, or remove it")
    return lists


DRAWN = (None, "train")  # folders whose patients may be drawn for val and test


def draws(rows, lists):
    """Whether assign_splits() draws patients: no list and no folder says who validates."""
    folders = {r.split for r in rows}
    return not lists and "val" not in folders and not folders.isdisjoint(DRAWN)


def assign_splits(rows, lists, args):
    """Gives every row its split: from list files, from its folder, or by patient with a seed.

    Without a folder val, labeled rows of the folder train, and of no folder, go by patient.
    Unlabeled ones train, or are left out if their patient is in val or test.
    -> rows in their final order
    """
    if not draws(rows, lists) and args.given:
        print(
            f"note: without effect: {', '.join(args.given)}; {'lists' if lists else 'folders'} say "
            "which split a case belongs to"
        )
    if lists:
        return assign_lists(rows, lists, args.src)
    if not draws(rows, lists):
        return [r._replace(split=r.split or "train") for r in rows]
    print(f"no list of splits: by patient, with seed {args.seed}")
    kept = [r for r in rows if r.split not in DRAWN]
    labeled = [r for r in rows if r.split in DRAWN and r.mask]
    patients = sorted({r.patient for r in labeled})
    order = np.random.default_rng(args.seed).permutation(len(patients))
    drawn = [patients[i] for i in order]
    n_val, n_test = (
        max(round(share * len(drawn)), int(share > 0 and len(drawn) > 2))
        for share in (args.val, args.test)
    )
    if 0 < len(drawn) <= n_val + n_test:
        raise InputError(
            f"--val {args.val:g} --test {args.test:g}: of {len(drawn)} patients with labels, "
            f"{n_val} would validate and {n_test} test, and none would train; give smaller shares"
        )
    split_of = dict(zip(drawn, ["val"] * n_val + ["test"] * n_test + ["train"] * len(drawn)))
    # train order is random too: --labeled takes the first patients
    rank = {patient: i for i, patient in enumerate(drawn)}
    labeled.sort(key=lambda r: rank[r.patient])
    bare = [r for r in rows if r.split in DRAWN and not r.mask]
    found = [r._replace(split=split_of.get(r.patient, "train")) for r in labeled + bare]
    tested = {r.patient for r in kept if r.split == "test"}
    return [r for r in found if r.mask or r.split == "train" and r.patient not in tested] + kept


def assign_lists(rows, lists, src):
    """The rows that lists name, in their order.

    InputError where a list contradicts a folder, or where a case of val has no label.

    A case of any folder may be listed as unlabeled: its label is not used.
    """
    by_name, found = {r.name: r for r in rows}, []
    twice = [name for name, count in Counter(r.name for r in rows).items() if count > 1]
    for split, names in lists.items():
        for name in names:
            if name in twice:
                raise InputError(
                    f"{split}.txt: {src} has several cases called '{name}'; "
                    "rename them, or remove the lists"
                )
            if name not in by_name:
                raise InputError(
                    f"{split}.txt: case '{name}' is not among those of "
                    f"{src}; write names such as '{rows[0].name}', one a line"
                )
            row = by_name[name]
            if row.split and split not in (row.split, "unlabeled"):
                raise InputError(
                    f"{split}.txt: case '{name}' is {row.image}, which is of split "
                    f"'{row.split}'; move the file, or remove the name from the list"
                )
            found.append(row._replace(split=split))
    if lost := [r.name for r in found if r.split == "val" and not r.mask]:
        raise InputError(
            f"val.txt: case '{lost[0]}' has no label ({len(lost)} such cases); list it in "
            "train.txt or unlabeled.txt"
        )
    return found


# ------------------------------------------------------------------------------------ patients


def add_patient(p):
    """The option of converters that says which cases are of one patient."""
    p.add_argument(
        "--patient",
        metavar="REGEX",
        help="its one group gives the patient from a case's name; default: as the layout says, "
        "mostly a case is a patient",
    )


def name_patients(rows, args):
    """Rows whose patient is what the one group of --patient, if given, finds in the case's name."""
    regex = args.patient
    if not regex:
        return rows
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise InputError(f"--patient {regex}: not a regular expression ({error})") from None
    if pattern.groups != 1:
        raise InputError(
            f"--patient {regex}: {pattern.groups} groups; one is needed, as in '(patient\\d+)_'"
        )
    found = [pattern.search(r.name) for r in rows]
    if lost := [r.name for r, match in zip(rows, found) if not match or not match[1]]:
        raise InputError(
            f"--patient {regex}: finds nothing in the name of case '{lost[0]}' "
            f"({len(lost)} such cases); give one that fits every name"
        )
    return [r._replace(patient=match[1]) for r, match in zip(rows, found)]


def note_shared(info, other):
    """A note where the unlabeled images of a second file are of patients of val or test of `info`.

    Any of three tells: the same patient name, unless it is only a case's name; the same source, in
    datasets of the same name; equal grid, mean and deviation of an image. No image is opened. Where
    none does, but most names of cases are the same, they may be the same images in another size.
    """
    scored = {}
    for split in ("val", "test"):
        for entry in info.splits.get(split, ()):
            scored |= dict.fromkeys(_marks(info, split, entry), f"{split}/{entry.name}")
    both = [
        (f"{split}/{entry.name}", entry.patient, scored[mark])
        for split in ("train", "unlabeled")
        for entry in other.splits.get(split, ())
        for mark in _marks(other, split, entry)
        if mark in scored
    ]
    if both:
        name, patient, twin = both[0]
        count = len({name for name, *_ in both})
        print(
            f"note: {other.path}: holds patients of val or test of {info.path}, such as {patient} "
            f"({name} beside {twin}; {count} in all): scores would be too good; take them out"
        )
        return
    ours, theirs = (
        {entry.name for split in parts for entry in each.splits.get(split, ())}
        for each, parts in ((info, ("val", "test")), (other, ("train", "unlabeled")))
    )
    if 2 * len(ours & theirs) > min(len(ours), len(theirs)):
        print(
            f"note: {other.path}: has cases with names of val or test of {info.path}, such as "
            f"{min(ours & theirs)} ({len(ours & theirs)} in all): if they are the same images, "
            "scores would be too good; take them out"
        )


def _marks(info, split, entry):
    """What tells a case's patient in any file. -> list"""
    marks = [(info.name, entry.source)] if entry.source else []
    if np.max(entry.std or 0) > 1e-6:  # not one value everywhere
        marks.append((entry.grid, entry.mean, entry.std))
    if entry.patient not in (entry.name, f"{split}/{entry.name}"):
        marks.append(entry.patient)
    return marks


MARKS = " _.-"  # characters that part a name
DATE = re.compile(
    r"(?<!\d)(19|20)\d\d([-_.]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)"
    r"([T_ -]*([01]\d|2[0-3])[-_.]?[0-5]\d([-_.]?[0-5]\d)?(?!\d))?"
)  # 2019-03-04, also with a time of day
SIDES = {"l", "r", "left", "right", "od", "os"}  # of a body; od and os are eyes
OF_ONE = (
    rf"(.+)[{MARKS}]+[^{MARKS}]+",  # p01_2, patient001_frame01: what comes before the last mark
    r"(.*\d)[A-Za-z]+\d*",  # p01b, P1S3: what comes before the last letters
    r"([^\W\d_]+)\d+",  # anna2: what comes before the number
)
FEW = 10  # images of a patient: names without a number that begin more are kinds, as in benign_100


def stem_of(name):
    """The part of a name that may be a patient's, or None."""
    if date := DATE.search(name):
        before, after = name[: date.start()].strip(MARKS), name[date.end() :].strip(MARKS)
        return before or stem_of(after) or after or None
    parts = re.split(rf"[{MARKS}]+", name)
    if len(parts) > 1 and parts[-1].lower() in SIDES:
        return "_".join(parts[:-1])
    if len(parts) > 1 and parts[0].lower() in SIDES:
        return "_".join(parts[1:])
    for pattern in OF_ONE:
        if match := re.fullmatch(pattern, name):
            return match[1]
    return None


def alike(rows):
    """Groups of rows that count as patients of their own, but whose names begin alike.

    -> a list of lists; empty where hardly any names do, or where all do, as in case_1, case_2
    """
    rows = [r for r in rows if r.patient in (r.name, f"{r.split}/{r.name}")]
    groups = {}
    for row in rows:
        groups.setdefault(stem_of(row.name) or row.name, []).append(row)
    words = [stem for stem in groups if not re.search(r"\d", stem)]
    if len(words) < 2 or sum(len(groups[w]) for w in words) > FEW * len(words):
        groups = {stem: group for stem, group in groups.items() if stem not in words}
        if words:
            groups[""] = []  # the others are not all names
    several = [group for group in groups.values() if len(group) > 1]
    if len(groups) < 2 or sum(map(len, several)) < max(2, len(rows) / 10):
        return []
    return several


def note_patients(rows, drawn=False):
    """A note where cases of different splits have names that begin alike.

    drawn: whether the splits are by patient, so that all such names matter
    """
    groups = alike(rows)
    apart = [group for group in groups if len({r.split for r in group}) > 1]
    if not (apart or drawn and groups):
        return
    first = (apart or groups)[0]
    second = next((r for r in first if r.split != first[0].split), first[1])
    where = f" in {first[0].split}", f" in {second.split}"
    where = where if apart else ("", "")
    print(
        f"note: {first[0].name}{where[0]} and {second.name}{where[1]} count as two patients; if "
        f"they are of one, say so with --patient ({len(apart or groups)} such groups of names)"
    )
