"""Datasets: what is written is read back, order and patients are kept, usual layouts are read."""

import collections
import csv
import os
import shutil
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, make_pictures
from scipy import ndimage

import corrupt
import evaluate
import train_qp
import train_ssl
from data import h5, images, loading, nifti, phantom, ssl4mis, supervision
from data.files import InputError
from data.splits import Row, assign_splits

REAL = ROOT.parent / "shared" / "data"


def case(split="train", name="a", shape=(8, 10), patient="p", label=True, **kwargs):
    rng = np.random.default_rng(0)
    grid = shape[:-1] if shape[-1] == 3 else shape
    return h5.Case(
        split=split,
        name=name,
        image=rng.integers(0, 255, shape, np.uint8),
        label=rng.integers(0, 2, grid, np.uint8) if label else None,
        patient=patient,
        **kwargs,
    )


def write(path, cases, classes=("background", "thing"), **kwargs):
    return h5.write(
        path, cases, name="test", classes=list(classes), **dict(dims=2, channels=1) | kwargs
    )


def test_round_trip_keeps_pixels_order_spacing_and_missing_labels(tmp_path):
    cases = [
        case(name=n, patient=n, spacing=(2.0, 0.5) if n == "z" else None, label=n != "m")
        for n in ("z", "m", "a", "k2", "k10")
    ]
    info = write(tmp_path / "f.h5", cases)
    assert [e.name for e in info.entries("train")] == ["z", "m", "a", "k2", "k10"]
    assert [(e.labeled, e.spacing, e.spacing_known) for e in info.entries("train")][:2] == [
        (True, (2.0, 0.5), True),
        (False, (1.0, 1.0), False),
    ]
    with h5.open_file(info.path) as f:
        for c in cases:
            image, label = h5.read_case(f, info, "train", c.name)
            assert (image[0] == c.image).all()
            assert label is None if c.label is None else (label[0] == c.label).all()


@pytest.mark.parametrize(
    "bad, words",
    [
        ([case(patient="p"), case("val", "b", patient="p")], "both 'train' and 'val'"),
        ([case(), case()], "twice"),
        ([], "no case"),
        ([case(shape=(8, 10, 3))], "label of shape"),
        ([case(name="../escape")], "slash"),
        ([case("training")], "split 'training'"),
        ([case(spacing=(1.0, 0.0))], "spacing"),
    ],
)
def test_writing_refuses_and_leaves_nothing(tmp_path, bad, words):
    with pytest.raises(InputError, match=words):
        write(tmp_path / "f.h5", bad)
    assert not list(tmp_path.iterdir())


def test_writing_refuses_labels_beyond_the_classes_and_broken_pixels(tmp_path):
    bad = case()
    bad.label[0, 0] = 7
    with pytest.raises(InputError, match="case 'a'.*values up to 7, but there are 2 classes"):
        write(tmp_path / "f.h5", [bad])
    bad = case()
    bad.image = bad.image.astype(np.float32) * np.nan
    with pytest.raises(InputError, match="NaN"):
        write(tmp_path / "f.h5", [bad])


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    write(tmp_path / "f.h5", [case()])
    before = (tmp_path / "f.h5").read_bytes()
    with pytest.raises(InputError):
        write(tmp_path / "f.h5", [case(), case()])
    assert (tmp_path / "f.h5").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_of_a_dataset_is_removed(tmp_path):
    dead, *others = (
        tmp_path / f".{name}.part"
        for name in (f"d.h5.{10**9 - 1}", f"d.h5.{os.getppid()}", "d.h5.1234567890", "e.h5.999999")
    )
    for path in (dead, *others):
        path.touch()
    write(tmp_path / "d.h5", [case()])
    assert not dead.exists() and all(path.exists() for path in others)


def test_reading_refuses_damage(tmp_path, gray, refused):
    data = open(gray, "rb").read()
    (tmp_path / "cut.h5").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.h5").write_text("not HDF5")
    shutil.copy(gray, tmp_path / "patient.h5")
    with h5py.File(tmp_path / "patient.h5", "a") as f:
        f["val/phantom006"].attrs["patient"] = "phantom000"
    shutil.copy(gray, tmp_path / "label.h5")
    with h5py.File(tmp_path / "label.h5", "a") as f:
        f["train/phantom003/label"][1, 2, 3] = 9
    shutil.copy(gray, tmp_path / "grid.h5")
    with h5py.File(tmp_path / "grid.h5", "a") as f:
        del f["train/phantom003/label"]
        f["train/phantom003/label"] = np.zeros((4, 48, 47), np.uint8)
    for name, word in (
        ("none", "no such file"),
        ("cut", "HDF5"),
        ("text", "HDF5"),
        ("patient", "phantom000"),
        ("label", "phantom003"),
        ("grid", "phantom003"),
    ):
        refused(h5.main, [tmp_path / f"{name}.h5"], f"{name}.h5", word)


def test_a_file_that_takes_the_place_of_the_one_that_was_opened(gray, tmp_path, refused):
    path = str(tmp_path / "d.h5")
    shutil.copy(gray, path)
    info = h5.read_info(path)
    cases = loading.whole_cases(info, "val")
    first, _ = list(cases)[0], shutil.copy(gray, path)
    assert (next(loading.whole_cases(info, "val")).image == first.image).all()  # the same again
    phantom.main(
        ["--out", path, *"--train 6 --val 2 --test 1 --depth 4 --size 48 --seed 9".split()]
    )
    refused(lambda _: list(loading.whole_cases(info, "val")), [], "was replaced", "begin again")
    phantom.main(["--out", path, *"--train 6 --val 1 --test 1 --depth 4 --size 48".split()])
    refused(lambda _: list(loading.whole_cases(info, "val")), [], "was replaced", "begin again")


def test_labeled_means_the_first_patients_in_order(gray):
    info = h5.read_info(gray)
    names = [e.name for e in info.entries("train")]
    assert supervision.choose_labeled(info, "2") == (names[:2], names[2:])
    assert supervision.choose_labeled(info, "0.5") == (names[:3], names[3:])
    assert supervision.choose_labeled(info, "all") == (names, [])
    drawn = [supervision.choose_labeled(info, "2", seed)[0] for seed in range(6)]
    again = supervision.choose_labeled(info, "2", 1)[0]
    assert len({tuple(d) for d in drawn}) > 1 and drawn[1] == again
    for wrong in ("0", "7", "many", "0.0", "-1"):
        with pytest.raises(InputError, match="--labeled"):
            supervision.choose_labeled(info, wrong)


def test_labels_of_unlabeled_cases_are_never_read_and_need_not_exist(tmp_path, gray):
    shutil.copy(gray, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        for name in list(f["train"])[2:]:
            del f["train"][name]["label"]
    info = h5.read_info(tmp_path / "f.h5")
    labeled, others = supervision.choose_labeled(info, "2")
    assert len(loading.load_slices(info, "train", 32, others, labels=False)) == 16
    assert supervision.choose_labeled(info, "all")[0] == labeled
    with pytest.raises(InputError, match="no label"):
        loading.load_slices(info, "train", 32, others)


def test_slices_are_standardized_per_case(gray):
    info = h5.read_info(gray)
    slices = loading.load_slices(info, "val", 48)
    x, y = slices.batch(torch.arange(4))
    with h5.open_file(gray) as f:
        image, label = h5.read_case(f, info, "val", "phantom006")
    assert np.allclose(x[:, 0].numpy(), (image - image.mean()) / image.std(), atol=1e-4)
    assert (y.numpy() == label).all() and slices.at[:5] == [(0,), (1,), (2,), (3,), (0,)]


def test_rgb_keeps_channels(rgb):
    slices = loading.load_slices(h5.read_info(rgb), "train", 32)
    assert slices.image.shape[1:] == (3, 32, 32) and slices.label.max() == 1


def test_phantoms_of_another_kind():
    """The same patient, once as usual and once of each foreign kind."""

    def draw(kind):
        return phantom.patient(np.random.default_rng(5), 6, 48, kind)

    image, label = draw(None)

    def contrast(image):  # of the left ventricle to its muscle
        return image[label == 3].mean() - image[label == 2].mean()

    dark, same = draw("contrast")
    assert (same == label).all() and contrast(image) > 0 > contrast(dark)
    cut, less = draw("cut")
    black = [(np.moveaxis(cut, axis, 0)[:14] == 0).all() for axis in (1, 2)]
    assert sum(black) == 1  # .3 of 48 at least, at the start of one axis
    assert not less[cut == 0].any() and 0 < (less > 0).sum() < (label > 0).sum()
    ghosts, same = draw("ghosts")
    assert (same == label).all() and contrast(ghosts) < 0.9 * contrast(image)
    assert not draw("body")[1].any()
    assert set(phantom.FOREIGN) == {"contrast", "cut", "ghosts", "body"}


def test_phantom_with_an_archive(tmp_path):
    """Half of the archive's patients are foreign, of each kind alike; none has a label."""
    small = "--train 2 --val 1 --test 1 --depth 4 --size 32 --unlabeled 16 --foreign 0.5"
    phantom.main(["--out", str(tmp_path / "p.h5"), *small.split()])
    info = h5.read_info(tmp_path / "p.h5")
    archive = info.splits["unlabeled"]
    assert len(archive) == 16 and not any(entry.labeled for entry in archive)
    kinds = [entry.source.partition("foreign: ")[2] for entry in archive]
    assert collections.Counter(kinds) == {"": 8, "contrast": 2, "cut": 2, "ghosts": 2, "body": 2}


def test_phantom_is_the_same_for_a_seed():
    a, b, c = (phantom.patient(np.random.default_rng([s, 0]), 4, 40) for s in (0, 0, 1))
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all() and (a[0] != c[0]).any()
    assert set(np.unique(a[1])) == {0, 1, 2, 3} and 0 <= a[0].min() and a[0].max() <= 1


def test_options_leave_the_default_phantom_as_it_was(tmp_path):
    small = "--train 2 --val 1 --test 1 --depth 4 --size 32 --unlabeled 4 --foreign 1"
    phantom.main(["--out", str(tmp_path / "p.h5"), *small.split()])
    assert h5.read_info(tmp_path / "p.h5").checksum == 4123490118  # before there were options


def test_phantom_with_a_rare_class(tmp_path):
    """Most patients have a scar in the myocardium, brighter than what is around it."""
    small = "--train 10 --val 1 --test 0 --depth 8 --size 48 --dims 3 --rare"
    phantom.main(["--out", str(tmp_path / "p.h5"), *small.split()])
    info = h5.read_info(tmp_path / "p.h5")
    assert info.classes == [*phantom.CLASSES, "scar"]
    shares = []
    for i, case in enumerate(loading.whole_cases(info, "train")):
        scar = case.label == 4
        shares.append(scar.mean())
        plain = phantom.patient(np.random.default_rng([0, i]), 8, 48)[1]
        assert (np.where(scar, 2, case.label) == plain).all()  # else the heart is as it was
        around = ndimage.binary_dilation(scar) & ~scar
        if scar.any():
            assert case.image[0, scar].mean() > case.image[0, around].mean() + 0.2
    assert 0 < shares.count(0) < 4 and 0.0005 < np.mean(shares) < 0.0015
    assert not phantom.patient(np.random.default_rng(5), 8, 48, "body", rare=True)[1].any()


@pytest.mark.parametrize("dims", [2, 3])
def test_phantom_of_two_channels(dims, tmp_path):
    """The muscle looks as the tissue in one, as the blood in the other; each has its own noise."""
    small = f"--train 6 --val 1 --test 0 --depth 8 --size 48 --dims {dims} --channels 2"
    phantom.main(["--out", str(tmp_path / "p.h5"), *small.split()])
    info = h5.read_info(tmp_path / "p.h5")
    assert (info.dims, info.channels, info.channel_names) == (dims, 2, [*phantom.CONTRASTS])
    outer, inner, alike = [], [], []  # contrast of muscle to tissue and blood; noise
    for case in loading.whole_cases(info, "train"):
        muscle, blood = case.label == 2, case.label == 3
        tissue = ndimage.binary_dilation(muscle | blood, iterations=3) & (case.label == 0)
        medians = [np.median(case.image[:, part], 1) for part in (muscle, tissue, blood)]
        outer.append(abs(medians[0] - medians[1]))
        inner.append(abs(medians[0] - medians[2]))
        noise = np.diff(case.image[:, :, :6, :6], axis=1).reshape(
            2, -1
        )  # a corner, outside the body
        alike.append(np.corrcoef(noise)[0, 1])
    assert np.max(outer, 0)[0] < 0.05 and np.min(outer, 0)[1] > 0.1
    assert np.max(inner, 0)[1] < 0.05 and np.min(inner, 0)[0] > 0.1
    assert max(np.abs(alike)) < 0.4


def test_foreign_phantoms_of_two_channels():
    """What is wrong with them is so in both channels alike."""
    for kind in phantom.FOREIGN:
        image, label = phantom.patient(np.random.default_rng(5), 6, 48, kind, channels=2)
        assert image.shape == (6, 48, 48, 2) and label.shape == (6, 48, 48)
        same = phantom.patient(np.random.default_rng(5), 6, 48, kind)[1]
        assert (label == same).all() or kind == "cut"  # drawn after the noise
        if kind == "cut":
            assert (image[label > 0] > 0).mean(0).min() > 0.9
            gone = (image == 0).all(-1)
            assert any((np.moveaxis(gone, a, 0)[:14]).all() for a in (1, 2))


def test_pictures_thresholded_split_by_patient_and_checked(tmp_path, refused):
    src = make_pictures(tmp_path / "src", 5)
    images.main(
        [str(src), "--out", str(tmp_path / "a.h5"), "--val", "0.4", "--test", "0.2", "--size", "32"]
    )
    info = h5.read_info(tmp_path / "a.h5")
    assert {s: len(e) for s, e in info.splits.items()} == {"train": 2, "val": 2, "test": 1}
    (src / "train.txt").write_text("p3\np1\n"), (src / "val.txt").write_text("p0\n")
    images.main([str(src), "--out", str(tmp_path / "b.h5")])
    info = h5.read_info(tmp_path / "b.h5")
    assert [e.name for e in info.entries("train")] == ["p3", "p1"] and info.entries("val")[
        0
    ].grid == (40, 56)
    with h5.open_file(info.path) as f:
        truth = cv2.imread(str(src / "masks" / "p3.png"), 0) > 127
        assert (h5.read_case(f, info, "train", "p3")[1][0] == truth).all()
    cv2.imwrite(str(src / "masks" / "p1.png"), np.zeros((40, 55), np.uint8))
    refused(images.main, [src, "--out", tmp_path / "c.h5"], "p1.png", "55 x 40", "56 x 40")
    (src / "images" / "p1.png").write_bytes(b"not a picture")
    refused(images.main, [src, "--out", tmp_path / "c.h5"], "p1.png", "not a readable picture")
    (src / "train.txt").write_text("nobody\n")
    refused(images.main, [src, "--out", tmp_path / "c.h5"], "nobody")
    refused(images.main, [src, "--out", tmp_path / "c.h5", "--lists", tmp_path / "typo"], "--lists")
    refused(images.main, [tmp_path / "nothing", "--out", tmp_path / "c.h5"], "no such folder")
    refused(images.main, [tmp_path, "--preset", "ph2", "--out", tmp_path / "c.h5"], "no picture")
    assert not (tmp_path / "c.h5").exists()


@pytest.mark.parametrize("main", [images.main, nifti.main, ssl4mis.main, phantom.main])
def test_a_folder_as_out_is_refused_before_anything_is_read(main, tmp_path, refused):
    """Else the file would fail to take its place when all is converted."""
    source = [] if main is phantom.main else [tmp_path / "src"]
    for out in (tmp_path, f"{tmp_path}/new/"):
        refused(main, [*source, "--out", out], f"{out}: a folder, not a file; name a file in it")
    refused(main, [*source, "--out", ""], "--out: is empty; name a file")


def test_an_empty_argument_is_refused(refused, tmp_path):
    """That of a variable that is not set, which would count as not given, or as this folder."""
    out = ["--out", tmp_path / "f.h5"]
    refused(images.main, ["", *out], "argument src: is empty; give a value")
    for empty in (["--patient", ""], ["--patient="], ["--lists", ""]):
        name = empty[0].removesuffix("=")
        refused(images.main, ["SRC", *out, *empty], f"argument {name}: is empty; give a value, or")
    refused(nifti.main, ["SRC", *out, "--val", ""], "argument --val", "''")
    for main in (corrupt.main, train_qp.main, train_ssl.main, evaluate.main):
        refused(main, ["", "--out", tmp_path], "argument data: is empty")


def test_masks_are_never_silently_misread(tmp_path, refused):
    def convert(mask, name="p1.png", *more):
        src = make_pictures(tmp_path / str(len(list(tmp_path.iterdir()))), 4)
        (src / "masks" / "p1.png").unlink()
        cv2.imwrite(str(src / "masks" / name), mask)
        return images.main, [src, "--out", tmp_path / "f.h5", *more]

    def label(*args):
        main, argv = convert(*args)
        main([str(a) for a in argv])
        info = h5.read_info(tmp_path / "f.h5")
        split = next(s for s, es in info.splits.items() for e in es if e.name == "p1")
        with h5.open_file(info.path) as f:
            return h5.read_case(f, info, split, "p1")[1][0]

    several = np.zeros((40, 56), np.uint8)
    several[5:9], several[20:30] = 1, 2
    for mask in (several // 2, several // 2 * 255, np.dstack([several // 2 * 255] * 3)):
        assert (label(mask) == several // 2).all()
    refused(*convert(several), "p1.png", "--classes")
    assert not label(np.zeros((40, 56), np.uint8)).any()
    refused(*convert(several.astype(np.uint16) * 300), "p1.png", "label value 300")
    refused(*convert(several, "other.png"), "other.png", "no picture of that name")


def test_folder_preset_with_splits_and_unlabeled(tmp_path):
    for split in ("train", "val", "unlabeled"):
        make_pictures(tmp_path / "src" / split, 2, seed=len(split))
    shutil.rmtree(tmp_path / "src" / "unlabeled" / "masks")
    images.main([str(tmp_path / "src"), "--out", str(tmp_path / "f.h5")])
    info = h5.read_info(tmp_path / "f.h5")
    assert {s: [e.labeled for e in es] for s, es in info.splits.items()} == {
        "train": [True] * 2,
        "val": [True] * 2,
        "unlabeled": [False] * 2,
    }


def test_val_is_drawn_from_pictures_with_masks(tmp_path, capsys):
    """Few masks among many pictures, or unlabeled ones in a folder of their own, are usual."""
    src, out = make_pictures(tmp_path / "src", 8), tmp_path / "f.h5"
    shutil.rmtree(make_pictures(src / "unlabeled", 2, seed=1) / "masks")
    for path in sorted(src.glob("*/p?.png")):  # p0 and p4 are of patient 0, and so on
        i = int(path.stem[1:])
        path.rename(path.with_stem(f"{i % 4}_{i}"))
        if path.parent.name == "masks" and i > 3:
            path.with_stem(f"{i % 4}_{i}").unlink()

    def labeled(*more):
        images.main([str(src), "--out", str(out), "--val", "0.5", *more])
        return {s: [e.labeled for e in es] for s, es in h5.read_info(out).splits.items()}

    found = {"train": [True] * 2 + [False] * 4, "val": [True] * 2, "unlabeled": [False] * 2}
    assert labeled() == found and "left out" not in capsys.readouterr().out
    assert labeled("--patient", "([^_]+)") == found | {"train": [True] * 2 + [False] * 2}
    said = capsys.readouterr().out
    assert "2 of 10 pictures are left out: they have no mask, and their patients are in" in said


def test_without_a_folder_val_it_is_drawn_from_train(tmp_path):
    """Names may be the same in both folders."""
    for split in ("train", "test"):
        make_pictures(tmp_path / "src" / split, 4)
    images.main([str(tmp_path / "src"), "--out", str(tmp_path / "f.h5")])
    splits = h5.read_info(tmp_path / "f.h5").splits
    assert {s: len(entries) for s, entries in splits.items()} == {"train": 3, "val": 1, "test": 4}


def test_a_picture_without_a_mask_does_not_train_where_its_patient_is_tested():
    row = lambda name, mask, split: Row(name, "i.png", mask, name[0], split)
    rows = [row("a1", "m.png", "train"), row("b1", None, "train"), row("b2", "m.png", "test")]
    found = assign_splits(rows, None, SimpleNamespace(val=0, test=0, seed=0))
    assert [(r.name, r.split) for r in found] == [("a1", "train"), ("b2", "test")]


def test_several_classes_from_gray_values(tmp_path, refused):
    src = make_pictures(tmp_path / "src", 3)
    for i, p in enumerate((src / "masks").iterdir()):
        cv2.imwrite(str(p), np.full((40, 56), i, np.uint8))
    argv = [src, "--out", tmp_path / "f.h5", "--val", "0.34", "--classes"]
    images.main([str(a) for a in (*argv, "background,a,b")])
    assert "a 0.500" in h5.summary(h5.read_info(tmp_path / "f.h5")) or "a 1.000" in h5.summary(
        h5.read_info(tmp_path / "f.h5")
    )
    cv2.imwrite(str(src / "masks" / "p1.png"), np.full((40, 56), 3, np.uint8))
    refused(images.main, [*argv, "background,a,b"], "p1.png", "values up to 3")
    cv2.imwrite(str(src / "masks" / "p1.png"), np.full((40, 56, 3), (0, 1, 2), np.uint8))
    refused(images.main, [*argv, "background,a,b"], "p1.png", "colored")


def test_cvc_is_split_by_sequence(tmp_path, refused):
    src = make_pictures(tmp_path / "src", 12)
    for p in [*src.glob("*/*.png")]:
        p.rename(p.with_name(p.name[1:]))
    (src / "images").rename(src / "Original"), (src / "masks").rename(src / "Ground Truth")
    refused(images.main, [src, "--preset", "cvc", "--out", tmp_path / "f.h5"], "sequences.csv")
    with open(src / "sequences.csv", "w", newline="") as f:
        csv.writer(f).writerows([("frame", "sequence"), *((i, i // 3) for i in range(12))])
    images.main([str(src), "--preset", "cvc", "--out", str(tmp_path / "f.h5"), "--val", "0.25"])
    info = h5.read_info(tmp_path / "f.h5")
    assert len(info.entries("val")) == 3 and len({e.patient for e in info.entries("val")}) == 1
    assert [e.name for e in info.entries("train")][:3] in [
        [str(3 * i + j) for j in range(3)] for i in range(4)
    ]


def make_ssl4mis(folder, patients=(9, 2)):
    rng = np.random.default_rng(0)
    (folder / "data" / "slices").mkdir(parents=True)

    def save(path, shape):
        with h5py.File(path, "w") as f:
            f["image"], f["label"] = (
                rng.random(shape, np.float32),
                rng.integers(0, 4, shape, np.uint8),
            )

    names = [f"patient{p:03d}_frame01_slice_{z}" for p in patients for z in (2, 10, 1)]
    for n in names:
        save(folder / "data" / "slices" / f"{n}.h5", (20, 24))
    save(folder / "data" / "patient005_frame01.h5", (3, 20, 24))
    (
        (folder / "train_slices.list").write_text("\n".join(names)),
        (folder / "val.list").write_text("patient005_frame01\n"),
    )
    return folder


def test_acdc_slices_become_volumes_in_list_order(tmp_path, refused):
    src = make_ssl4mis(tmp_path / "src")
    ssl4mis.main([str(src), "--out", str(tmp_path / "f.h5"), "--spacing", "10,1.5,1.5"])
    info = h5.read_info(tmp_path / "f.h5")
    assert [(e.patient, e.grid, e.spacing) for e in info.entries("train")] == [
        (p, (3, 20, 24), (10, 1.5, 1.5)) for p in ("patient009", "patient002")
    ]
    with (
        h5.open_file(info.path) as f,
        h5py.File(src / "data" / "slices" / "patient009_frame01_slice_10.h5") as last,
    ):
        assert (
            h5.read_case(f, info, "train", "patient009_frame01")[0][2] == last["image"][:]
        ).all()
    (src / "data" / "patient005_frame01.h5").unlink()
    refused(ssl4mis.main, [src, "--out", tmp_path / "g.h5"], "patient005_frame01.h5")
    refused(ssl4mis.main, [tmp_path, "--out", tmp_path / "g.h5"], "train_slices.list")
    refused(ssl4mis.main, [src, "--out", tmp_path / "g.h5", "--spacing", "1,2"], "--spacing")


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real datasets")
def test_real_volumes_of_la(tmp_path):
    ssl4mis.main([str(REAL / "LA"), "--out", str(tmp_path / "la.h5")])
    info = h5.read_info(tmp_path / "la.h5")
    assert info.dims == 3 and {s: len(e) for s, e in info.splits.items()} == {"train": 20, "val": 4}
    assert all(e.grid[0] == 88 for e in info.entries("train"))


def test_summary_and_preview(gray, rgb, tmp_path, capsys):
    for path in (gray, rgb):
        h5.main([path, "--preview", str(tmp_path / "p.png")])
        assert cv2.imread(str(tmp_path / "p.png")).shape[0] > 300
        text = capsys.readouterr().out
        assert "train" in text and "val" in text and "background" in text


@pytest.mark.parametrize("scale, refused", [(1, False), (1e-5, False), (1e-8, True)])
@pytest.mark.parametrize("channels", [1, 2])
def test_intensities_that_nobody_could_standardize_are_refused(scale, refused, channels, tmp_path):
    """What differs by rounding alone is no such image, and nobody standardizes a window."""
    image = np.random.default_rng(0).random((8, 20, 20, channels), np.float32)
    image[..., -1] *= scale
    case = h5.Case("train", "a", image.squeeze(), None, "a")
    names = ["b", "c"][:channels] if channels > 1 else None
    about = dict(name="x", classes=["background", "a"], dims=2)
    about |= dict(channels=channels, channel_names=names)
    write = lambda **more: h5.write(str(tmp_path / "d.h5"), [case], **about, **more)
    if refused:
        name = "c" if channels > 1 else "image"
        words = rf"case 'a': values of {name} from \S+ to \d\.\d+e-09 lie too close together"
        with pytest.raises(InputError, match=words):
            write()
        write(standardize=False)
        case.image[:] = 0.1
        case.image.flat[:40] = np.nextafter(np.float32(0.1), 1)
        write()
    else:
        (read,) = loading.whole_cases(write(), "train", labels=False)
        mean, std = np.atleast_1d(read.mean), np.atleast_1d(read.std)
        assert ((read.image[-1] - mean[-1]) / std[-1]).std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_axis_that_shrinks_is_averaged_whatever_the_others_do(dims):
    """Stripes of one pixel become gray, also where the image grows along the other axis."""
    stripes = np.zeros((1000, 20), np.float32)
    stripes[::2] = 1
    image, size = (stripes, 97) if dims == 2 else (stripes[:, :, None], (97, 40, 3))
    small = loading.resize_image(image, size)
    assert small.shape[:2] == (97, 97 if dims == 2 else 40)
    assert abs(small - 0.5).max() < 0.06  # the 10.3 pixels of each have 5 or 6 stripes
