"""Labels, classes, lists and patients: the right thing is stored, or refused with its place."""

import argparse
import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from conftest import make_pictures, python
from test_evaluate import make_run
from test_nifti import convert, load, make, save

import evaluate
import train_ssl
from data import h5, images, labels, nifti, splits, ssl4mis, supervision
from data.files import InputError, read_lists, read_table
from models import inference

SHAPE = (3, 16, 20)
K = 4
ACDC = ["background", "right ventricle", "myocardium", "left ventricle"]


# -------------------------------------------------------------------------------- label values


@pytest.mark.parametrize(
    "values, listed, numbers",
    [
        (np.float32([0.9999, 2.0001, 0]), range(3), [1, 2, 0]),
        (np.array([1 + 1e-7, 3]), range(4), [1, 3]),
        (np.int16([0, 850, 205]), (0, 205, 850), [0, 2, 1]),
        (np.float16([-1, 1]), (-1, 1), [0, 1]),
        (np.uint8([4, 0, 255]), (255, 4, 0), [1, 2, 0]),
        (np.array([True, False]), range(2), [1, 0]),
    ],
)
def test_values_become_class_numbers(values, listed, numbers):
    found = labels.class_numbers(values, "f", listed)
    assert found.tolist() == numbers and found.dtype == np.uint8


@pytest.mark.parametrize(
    "values, listed, word",
    [
        ([0, np.nan], range(4), "nan"),
        ([0, np.inf], (0, 1), "inf"),
        ([0.998], range(4), "0.998"),
        ([256], range(256), "256"),
        ([-1, 1], range(2), "-1"),
        ([3], (0, 1, 4), "0, 1, 4 do"),
        ([1.002], (0, 1), "1.002"),
        ([1e20], range(4), "1e\\+20"),
        (["x"], range(2), "type"),
        ([1j], range(2), "complex"),
    ],
)
def test_values_of_no_class_are_refused(values, listed, word):
    with pytest.raises(InputError, match=f"f: .*{word}"):
        labels.class_numbers(np.array(values), "f", listed)


def test_a_class_of_one_file_alone_is_noted(capsys):
    a, b, c = map(Path, "abc")
    for files in ({a: [0, 1, 2]}, {a: [0, 1], b: [0]}, {a: [0, 1, 2], b: [0, 2], c: [1]}):
        labels.count_classes(files, "f")
        assert not capsys.readouterr().out
    assert labels.count_classes({a: [0, 1], b: [0, 2], c: [0, 1]}, "f") == 3
    assert "note: b alone holds label value 2 of 0 to 2; if it means" in capsys.readouterr().out


def test_found_values_must_have_no_gap():
    a, b = Path("a.nii"), Path("b.nii")
    assert labels.count_classes({a: [0, 1, 2]}, "f") == 3
    assert labels.count_classes({a: [1], b: [0]}, "f") == 2
    for found, word in (
        ({0, 255}, "--labels 0,255"),
        ({0, 1, 2, 4}, "--labels 0,1,2,4"),
        ({0}, "nothing to learn"),
        (set(range(0, 200, 2)), "100 values"),
    ):
        with pytest.raises(InputError, match=word) as error:
            labels.count_classes({a: found, b: [0]}, "f")
        assert len(str(error.value)) < 300 and "both" not in str(error.value)
    with pytest.raises(InputError, match="a.nii holds 1 and b.nii 255: if both mean one class"):
        labels.count_classes({a: [0, 1], b: [0, 255]}, "f")
    with pytest.raises(InputError) as error:
        labels.count_classes({a: [0, 1, 4], b: [0, 255]}, "f")
    assert "both" not in str(error.value)


@pytest.mark.parametrize(
    "names, words",
    [
        ("cup,disc", "the first class is cup, .*; write background,cup,disc"),
        ("a,background,b", "the first class is a, .*; write background,a,b"),
        ("polyp", "the first class is polyp, .*; write background,polyp"),
        ("background", "two different names"),
        ("background,", "two different names"),
        ("background,a,a", "two different names"),
        ("background,a,Background", "twice.*; write background,a"),
        ("", "not named"),
    ],
)
def test_classes_begin_with_the_background(names, words, tmp_path, refused, capsys):
    """In every converter, and in dataset.json."""
    for main in (images.main, nifti.main, ssl4mis.main):
        refused(main, [tmp_path, "--out", tmp_path / "g.h5", "--classes", names], "--classes")
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        labels.class_names(names)
    for name in ("Background", "bg", "none"):
        assert labels.class_names(f"{name}, a") == [name, "a"]


def test_a_dataset_json_begins_with_the_background(tmp_path, refused):
    src = make(tmp_path / "src", ["a", "b"])
    (src / "dataset.json").write_text('{"labels": {"cup": 0, "disc": 1}}')
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "dataset.json", "first class is cup")


# -------------------------------------------------------------------------------- NIfTI


def test_nifti_labels_are_mapped_as_the_options_or_dataset_json_say(tmp_path, capsys, refused):
    src = make(tmp_path / "src", ["a", "b"])
    values = np.resize([0, 1, 2, 4], (4, 10, 12))
    save(src / "labelsTr" / "a.nii.gz", values.astype(np.float32) - np.float32(1e-4))
    save(src / "labelsTr" / "b.nii.gz", values.astype(np.int16))
    argv = [src, "--out", tmp_path / "g.h5"]
    refused(nifti.main, argv, "labelsTr", "--labels 0,1,2,4")
    refused(
        nifti.main, [*argv, "--labels", "0,1,2"], "labelsTr", ".nii.gz: label value", "0 to 2 do"
    )
    refused(nifti.main, [*argv, "--labels", "0,1,2,4", "--classes", "background,a"], "4 values")
    refused(nifti.main, [*argv, "--labels", "0,1,1"], "--labels")

    def right(info, names):
        assert info.classes == names
        for split in ("train", "val"):
            (entry,) = info.entries(split)
            assert (load(info, split, entry.name)[1] == np.minimum(values, 3)).all()

    names = ["background", "class 1", "class 2", "class 3"]
    right(convert(src, "--labels", "0,1,2,4", "--val", 0.5), names)
    assert "4 becomes 3" in capsys.readouterr().out
    names = ["background", "edema", "core", "rim"]
    right(convert(src, "--labels", "0,1,2,4", "--classes", ", ".join(names), "--val", 0.5), names)
    table = {"labels": {"rim": 4, "core": 2, "edema": 1, "background": 0}}
    for encoding in ("utf-8-sig", "utf-16"):
        (src / "dataset.json").write_text(json.dumps(table), encoding=encoding)
        right(convert(src, "--val", 0.5), names)
    refused(nifti.main, [*argv, "--labels", "0,1,2,3"], "dataset.json", "no label value 3")
    (src / "dataset.json").write_text('{"labels": {"0": "background", "1": "a", "1": "b"}}')
    refused(nifti.main, argv, "dataset.json", "twice")


def test_nifti_values_0_and_255_are_two_classes_and_not_256(tmp_path, refused):
    src = make(tmp_path / "src", ["a", "b"])
    for path in sorted((src / "labelsTr").iterdir()):
        save(path, np.resize(np.uint8([0, 0, 255]), (4, 10, 12)))
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "labelsTr", "--labels 0,255")
    info = convert(src, "--labels", "0,255", "--val", 0.5)
    assert info.classes == ["background", "class 1"]
    assert (
        load(info, "val", info.entries("val")[0].name)[1] == np.resize([0, 0, 1], (4, 10, 12))
    ).all()


# -------------------------------------------------------------------------------- ACDC and LA


def store(path, label, image=None):
    """A source file; the image is noise unless given, label None: without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).random(np.shape(label) if label is not None else SHAPE)
    with h5py.File(path, "w") as f:
        f["image"] = noise if image is None else image
        if label is not None:
            f["label"] = label


def acdc(folder, change=lambda y: y, count=K):
    """Two patients of three slices in train, one in val. change: what becomes of their labels"""
    label = np.resize(np.arange(count), SHAPE)
    names = [f"patient{p:03d}_frame01" for p in (1, 2)]
    for z in range(3):
        for name in names:
            store(folder / "data" / "slices" / f"{name}_slice_{z + 1}.h5", change(label[z]))
    store(folder / "data" / "patient003_frame01.h5", change(label))
    slices = [f"{name}_slice_{z + 1}\n" for name in names for z in range(3)]
    (folder / "train_slices.list").write_text("".join(slices))
    (folder / "val.list").write_text("patient003_frame01\n")
    return folder


def la(folder, change=lambda y: y, lines="{}\n"):
    """Four volumes of the LA layout, (W, H, D), the last one in val."""
    for i, split in enumerate(("train", "train", "train", "val")):
        store(folder / "set" / f"ID{i}" / "mri_norm2.h5", change(np.resize([0, 0, 1], (16, 20, 9))))
        with open(folder / f"{split}.list", "a") as f:
            f.write(lines.format(f"ID{i}"))
    return folder


def labels_of(info):
    """All labels of a file, in one list."""
    with h5.open_file(info.path) as f:
        return [h5.read_label(f, info, s, e.name) for s, es in info.splits.items() for e in es]


def from_lists(src, *more):
    out = str(src.parent / "f.h5")
    ssl4mis.main([str(src), "--out", out, *more])
    return h5.read_info(out)


def test_ssl4mis_labels_are_class_numbers(tmp_path, refused):
    almost = lambda y: (y - 1e-4).astype(np.float32)  # .9999, 1.9999
    info = from_lists(acdc(tmp_path / "a", almost))
    assert info.classes == ACDC and info.name == "ACDC"
    assert all((y == np.resize(np.arange(K), SHAPE)).all() for y in labels_of(info))
    truth = np.resize([0, 0, 1], (16, 20, 9)).transpose(2, 1, 0)
    for i, change in enumerate((almost, lambda y: y * 255, lambda y: y * 255.0)):
        info = from_lists(la(tmp_path / f"la{i}", change))
        assert info.classes == ["background", "left atrium"]
        assert all((y == truth).all() for y in labels_of(info))
    argv = ["--out", tmp_path / "g.h5"]
    for i, (wrong, word) in enumerate(
        ((256, "256"), (np.nan, "nan"), (-1, "-1"), (0.5, "0.5"), (9, "9"))
    ):
        change = lambda y, wrong=wrong: np.where(y == 1, wrong, y)
        refused(
            ssl4mis.main,
            [la(tmp_path / f"la bad{i}", change), *argv],
            "mri_norm2.h5: label value",
            word,
        )
        refused(
            ssl4mis.main,
            [acdc(tmp_path / f"bad{i}", change), *argv],
            "slice_1.h5: label value",
            word,
        )
    src = acdc(tmp_path / "size")
    store(
        src / "data" / "slices" / "patient001_frame01_slice_2.h5",
        np.zeros((15, 20)),
        np.zeros((16, 20)),
    )
    refused(ssl4mis.main, [src, *argv], "slice_2.h5: label of shape (15, 20)")
    assert not (tmp_path / "g.h5").exists()


def test_names_of_acdc_and_la_are_not_given_to_other_data(tmp_path, capsys, refused):
    prostate, argv = acdc(tmp_path / "prostate", count=3), ["--out", tmp_path / "g.h5"]
    refused(ssl4mis.main, [prostate, *argv], "prostate", "0 to 2", "4 classes", "--classes")
    info = from_lists(prostate, "--classes", "background,zone,gland")
    assert (info.name, info.classes) == ("prostate", ["background", "zone", "gland"])
    other = acdc(tmp_path / "other", lambda y: np.array([0, 1, 2, 4])[y])
    refused(ssl4mis.main, [other, *argv], "label value 4", "0 to 3", "--labels")
    refused(ssl4mis.main, [other, *argv, "--labels", "0,1,2,4"], "--classes")
    info = from_lists(other, "--labels", "0,1,2,4", "--classes", "background,x,y,z")
    assert all((y == np.resize(np.arange(K), SHAPE)).all() for y in labels_of(info))
    refused(ssl4mis.main, [la(tmp_path / "empty", lambda y: y * 0), *argv], "empty", "nothing to")
    zones = la(tmp_path / "zones", lambda y: y * np.resize([1, 2], y.shape))
    refused(ssl4mis.main, [zones, *argv], "label value 2", "--classes")
    assert {
        int(v)
        for y in labels_of(from_lists(zones, "--classes", "background,x,y"))
        for v in np.unique(y)
    } == {0, 1, 2}
    capsys.readouterr()
    from_lists(prostate, "--classes", "background,zone,gland,tumor")
    assert "no label of this file holds 'tumor'" in capsys.readouterr().out


def test_ssl4mis_images_that_are_none(tmp_path, refused):
    src, label = la(tmp_path / "la"), np.zeros((16, 20, 9), np.uint8)
    for image, word in (
        (np.full(label.shape, np.inf), "infinite"),
        (np.full(label.shape, 1e300), "float32 cannot hold"),
        (label[0], "axes"),
        (label * 1j, "complex"),
        (np.full(label.shape, b"x"), "type"),
    ):
        store(src / "set" / "ID1" / "mri_norm2.h5", label, image)
        refused(ssl4mis.main, [src, "--out", tmp_path / "g.h5"], "ID1/mri_norm2.h5", word)


# -------------------------------------------------------------------------------- lists and tables


def test_lists_in_any_usual_form(tmp_path, refused):
    path = tmp_path / "train.txt"
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\n")):
        path.write_bytes(end.join(["a 1", "", "  b\t", " "]).encode(encoding))
        assert read_lists({"train": path, "val": tmp_path / "val.txt"}) == {"train": ["a 1", "b"]}
    (tmp_path / "val.txt").write_text("b")
    with pytest.raises(InputError, match="val.txt: line 1 names 'b', as does line 3 of train.txt"):
        read_lists({"train": path, "val": tmp_path / "val.txt"})
    path.write_bytes("ä\n".encode("cp1252"))
    with pytest.raises(InputError, match="train.txt: line 1 is not UTF-8"):
        read_lists({"train": path})


def test_tables_in_any_usual_form(tmp_path):
    path = tmp_path / "t.csv"
    for text in (
        "frame,sequence\n1,2\n",
        "\ufeffframe;sequence\r\n1;2\r\n",
        "sequence\tframe \n2\t1\n",
        "frame,sequence,x\n1, 2,\n",
    ):
        path.write_text(text, encoding="utf-8")
        (row,) = read_table(path, ("frame", "sequence"))
        assert row["frame"] == "1" and row["sequence"] == "2"
    for text, word in (
        ("frame\n1\n", "no column 'sequence'"),
        ("frame,sequence\n1\n", "line 2 has no 'sequence'"),
        ("", "no column"),
        ("frame,sequence\n1,000,3\n", "line 2 has more cells"),
        ("frame,frame,sequence\n1,2,3\n", "2 column 'frame'"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=f"t.csv: .*{word}"):
            read_table(path, ("frame", "sequence"))


def test_names_in_lists_of_acdc_and_la(tmp_path, capsys, refused):
    for line, name in (
        ("patient001_frame01_slice_1.h5", "patient001_frame01_slice_1"),
        ("data\\slices\\a b.h5", "a b"),
        ("set/ID/mri_norm2.h5", "ID"),
        ("ID/mri_norm2", "ID"),
        ("ID/", "ID"),
        ("ID", "ID"),
        ("/", "/"),
    ):
        assert ssl4mis.name_of(line) == name
    info = from_lists(la(tmp_path / "la", lines="2018/{}/mri_norm2.h5 \r\n"))
    assert {s: [e.name for e in es] for s, es in info.splits.items()} == {
        "train": ["ID0", "ID1", "ID2"],
        "val": ["ID3"],
    }
    store(tmp_path / "la" / "old" / "ID1" / "mri_norm2.h5", np.zeros((16, 20, 9)))
    refused(
        ssl4mis.main,
        [tmp_path / "la", "--out", tmp_path / "g.h5"],
        "old/ID1",
        "set/ID1",
        "same name",
    )
    src = acdc(tmp_path / "acdc")
    plain = from_lists(src)
    listed = (src / "train_slices.list").read_text().split()
    (src / "train_slices.list").write_text(
        "\r\n".join(f"data/slices/{n}.h5" for n in listed), encoding="utf-16"
    )
    assert from_lists(src).checksum == plain.checksum
    capsys.readouterr()
    (src / "train_slices.list").write_text(
        "\n".join(n for n in listed if n != "patient001_frame01_slice_2")
    )
    from_lists(src)
    said = capsys.readouterr().out
    assert "note: 1 slices of frames in train_slices.list are not in it, such as" in said
    assert "patient001_frame01_slice_2; the volumes" in said and said.count("note") == 1
    (src / "data" / "slices" / "patient001_frame01_slice_2.h5").unlink()
    from_lists(src)
    assert "patient001_frame01 has 2 slices between 1 and 3" in capsys.readouterr().out
    store(src / "data" / "slices" / "patient001_frame01_slice_2.h5", np.eye(16, 20))
    (src / "train_slices.list").write_text("\n".join([*listed, listed[0] + ".h5"]))
    refused(
        ssl4mis.main, [src, "--out", tmp_path / "g.h5"], "train_slices.list", listed[0], "line 1"
    )


def test_volumes_of_la_may_lie_behind_a_link(tmp_path):
    src = la(tmp_path / "la")
    (src / "set").rename(tmp_path / "disk")
    (src / "set").symlink_to(tmp_path / "disk")
    assert len(from_lists(src).entries("train")) == 3


def test_lists_and_sequences_of_pictures(tmp_path, refused):
    src = make_pictures(tmp_path / "src", 4)
    (src / "train.txt").write_bytes("p3\r\np1 \r\n".encode("utf-16"))
    (src / "val.txt").write_bytes(b"\xef\xbb\xbfp0\n")
    out = ["--out", str(tmp_path / "f.h5")]
    images.main([str(src), *out])
    info = h5.read_info(tmp_path / "f.h5")
    assert {s: [e.name for e in es] for s, es in info.splits.items()} == {
        "train": ["p3", "p1"],
        "val": ["p0"],
    }
    for text, words in (
        ("p0\np0\n", ("val.txt", "line 2", "'p0'")),
        ("p1", ("val.txt", "p1", "train.txt")),
        ("p0.png", ("val.txt", "such as 'p0'")),
    ):
        (src / "val.txt").write_text(text)
        refused(images.main, [src, *out], *words)
    (src / "train.txt").unlink(), (src / "val.txt").unlink()
    (src / "images").rename(src / "Original"), (src / "masks").rename(src / "Ground Truth")
    argv = [src, "--preset", "cvc", *out]
    (src / "sequences.csv").write_text(
        "frame;sequence\np0;1\np1;1\np2;2\np3;03\n", encoding="utf-16"
    )
    images.main([str(a) for a in (*argv, "--val", "0.34")])
    patients = {
        e.name: e.patient for es in h5.read_info(tmp_path / "f.h5").splits.values() for e in es
    }
    assert patients == {
        "p0": "sequence01",
        "p1": "sequence01",
        "p2": "sequence02",
        "p3": "sequence03",
    }
    for text, word in (
        ("frame,sequence\np0,1\np0,2\n", "p0 comes twice"),
        ("frame,sequence\np0,1.0\n", "'1.0'"),
        ("frame,sequence\np0,1\n", "frame p1 has no sequence"),
        ("a,b\n1,2\n", "no column 'frame'"),
    ):
        (src / "sequences.csv").write_text(text)
        refused(images.main, argv, "sequences.csv", word)


# -------------------------------------------------------------------------------- pictures


def test_masks_of_listed_values(tmp_path, refused):
    src = make_pictures(tmp_path / "src", 3)
    values = np.resize(np.uint8([0, 128, 255]), (40, 56))
    for path in (src / "masks").iterdir():
        cv2.imwrite(str(path), values)
    argv = [src, "--out", tmp_path / "f.h5", "--val", "0.34"]
    for more in ([], ["--classes", "background,cup,disc"]):
        images.main([str(a) for a in (*argv, "--labels", "0,128,255", *more)])
        info = h5.read_info(tmp_path / "f.h5")
        assert len(info.classes) == 3 and all((y == values // 127).all() for y in labels_of(info))
    refused(images.main, [*argv, "--labels", "0,255"], ".png: label value 128", "0, 255 do")
    refused(images.main, [*argv, "--labels", "0,128,255", "--classes", "background,a"], "3 values")


def test_pictures_of_a_patient_stay_together(tmp_path, capsys):
    src, names = make_pictures(tmp_path / "src", 8), [f"p{i // 2:02d}_{i % 2}" for i in range(8)]
    for i, name in enumerate(names):
        for folder in ("images", "masks"):
            (src / folder / f"p{i}.png").rename(src / folder / f"{name}.png")
    argv = [str(src), "--out", str(tmp_path / "f.h5"), "--val", "0.5"]
    images.main(argv)
    said = capsys.readouterr().out
    assert "p02_0 in val and p02_1 in train count as two patients; if they are of one" in said
    images.main([*argv, "--patient", r"(p\d+)_"])
    assert "count as two patients" not in capsys.readouterr().out
    info = h5.read_info(tmp_path / "f.h5")
    assert all(e.patient == e.name[:3] for es in info.splits.values() for e in es)
    assert [len({e.patient for e in info.entries(s)}) for s in ("train", "val")] == [2, 2]
    (
        (src / "train.txt").write_text("\n".join(names[:4])),
        (src / "val.txt").write_text("\n".join(names[4:])),
    )
    images.main(argv)
    assert "count as two patients" not in capsys.readouterr().out


def test_masks_among_the_images_are_noted(tmp_path, capsys):
    """They would be unlabeled images, on which a network is trained."""
    src, out = make_pictures(tmp_path / "src", 3), ["--out", str(tmp_path / "f.h5")]
    for i in range(3):
        (src / "masks" / f"p{i}.png").rename(src / "images" / f"p{i}_mask.png")
    images.main([str(src), *out])
    words = "note: {} files have names of masks, such as {}; they are taken for images"
    assert words.format("3 of 6", src / "images" / "p0_mask.png") in capsys.readouterr().out
    src = make(tmp_path / "nifti", ["a", "b", "c"])
    (src / "labelsTr" / "c.nii.gz").rename(src / "imagesTr" / "a_seg.nii.gz")
    nifti.main([str(src), *out])
    assert words.format("1 of 2", src / "imagesTr" / "a_seg.nii.gz") in capsys.readouterr().out


KINDS = [f"{kind} ({i})" for kind in ("benign", "malignant", "normal") for i in range(20)]


@pytest.mark.parametrize(
    "names, told",
    [
        (["img001", "img002", "img003"], False),
        (["IMD002", "IMD003"], False),
        (["1", "2", "10"], False),
        (["ISIC_0012345", "ISIC_0012346"], False),
        (["IMG_1", "IMG_2"], False),
        (["case_0001", "case_0002"], False),
        (["la_2018_1", "la_2018_2"], False),
        (["21_training", "22_training"], False),
        (["cju0qk8", "cju1zz2"], False),
        (KINDS, False),
        (["2019-03-04", "2019-03-05", "2019-04-01"], False),
        (["IMG_20200101_101010", "IMG_20200102_111111"], False),
        (["p01_1", "p01_2", "p02_1"], True),
        (["patient001_frame01", "patient001_frame12", "patient002_frame01"], True),
        (["21-left", "21-right", "22-left"], True),
        (["p1a", "p1b", "p2a", "p2b"], True),
        (["P1S3", "P1S4", "P2S1"], True),
        (["anna_1", "anna_2", "ben_1", "ben_2"], True),
        (["anna1", "anna2", "ben1", "ben2"], True),
        (["smith_left", "smith_right", "doe_left"], True),
        (["L_01", "R_01", "L_02", "R_02"], True),
        (["smith_2019-03-04", "smith_2020-01-01", "doe_2019-03-04"], True),
        (["p7_20190304", "p7_20200101", "p8_20190304"], True),
        (["2019-03-04_smith", "2020-01-01_smith", "2019-03-04_doe"], True),
    ],
)
def test_a_note_where_names_look_like_those_of_one_patient(names, told, capsys):
    rows = lambda patient, *ss: [
        splits.Row(n, None, None, patient or n, ss[i % len(ss)]) for i, n in enumerate(names)
    ]
    splits.note_patients(rows(None, "train"), drawn=True)
    said = capsys.readouterr().out
    first, second = names[:2]
    assert (f"note: {first} and {second} count" in said) == told and said.count("\n") == told
    splits.note_patients(rows(None, "train", "val"))  # by lists
    said = capsys.readouterr().out
    assert (f"note: {first} in train and {second} in val count" in said) == told
    splits.note_patients(rows(None, "train"))
    splits.note_patients(rows("sequence", "train", "val"), drawn=True)
    assert not capsys.readouterr().out


def rename(src, old, new):
    for folder in ("images", "masks"):
        (src / folder / old).rename(src / folder / new)


def test_patients_across_splits_are_noted_in_every_layout(tmp_path, capsys):
    """Lists, folders of splits, imagesTs, and the lists of ACDC and LA."""
    names, told = ["anna_1", "ben_1", "anna_2", "ben_2"], "anna_1 in train and anna_2 in val count"
    src, out = make_pictures(tmp_path / "src", 4), ["--out", str(tmp_path / "f.h5")]
    for i, name in enumerate(names):
        rename(src, f"p{i}.png", f"{name}.png")
    (src / "train.txt").write_text("anna_1\nben_1")
    (src / "val.txt").write_text("anna_2\nben_2")
    images.main([str(src), *out])
    assert told in capsys.readouterr().out
    for split, those in (("train", names[:2]), ("val", names[2:])):
        for folder in ("images", "masks"):
            (tmp_path / "split" / split / folder).mkdir(parents=True)
            for name in those:
                (src / folder / f"{name}.png").rename(
                    tmp_path / "split" / split / folder / f"{name}.png"
                )
    images.main([str(tmp_path / "split"), *out])
    assert told in capsys.readouterr().out
    volumes = make(make(tmp_path / "nifti", ["p1_a", "p2_a"]), ["p1_b"], tr="Ts")
    convert(volumes, "--val", 0)
    assert "p1_a in train and p1_b in test count" in capsys.readouterr().out
    for i, name in enumerate(names):
        store(tmp_path / "la" / name / "mri_norm2.h5", np.resize([0, 0, 1], (16, 20, 9)) * (i < 9))
    (tmp_path / "la" / "train.list").write_text("anna_1\nben_1")
    (tmp_path / "la" / "val.list").write_text("anna_2\nben_2")
    from_lists(tmp_path / "la")
    assert told in capsys.readouterr().out
    (tmp_path / "la" / "val.list").write_text("ben_2")
    (tmp_path / "la" / "train.list").write_text("anna_1\nanna_2")
    info = from_lists(tmp_path / "la", "--patient", "([a-z]+)_")
    assert {e.patient for e in info.entries("train")} == {"anna"}
    assert "count as two" not in capsys.readouterr().out


def test_options_of_lists_that_cannot_be(tmp_path, refused):
    argv = [la(tmp_path / "la"), "--out", tmp_path / "g.h5"]
    refused(ssl4mis.main, [*argv, "--spacing", "0,1,1"], "--spacing: 0,1,1", "above 0")
    refused(ssl4mis.main, [*argv, "--shrink", "4"], "--shrink 4", "2 x 5 x 4", "a smaller one")


def test_patients_of_the_acdc_layout(tmp_path, capsys):
    """patientNNN_frameNN says who it is; any other frame is a patient of its own."""
    src = acdc(tmp_path / "a")
    assert [e.patient for e in from_lists(src).entries("train")] == ["patient001", "patient002"]
    for path in [*src.rglob("*.h5")]:
        number = path.name[9]
        path.rename(path.with_name(path.name.replace(f"patient00{number}_frame01", f"C_{number}")))
    for path in src.glob("*.list"):
        text = path.read_text().replace("_frame01", "").replace("patient00", "C_")
        path.write_text(text)
    capsys.readouterr()
    info = from_lists(src)
    assert [e.patient for es in info.splits.values() for e in es] == ["C_1", "C_2", "C_3"]
    assert "note" not in capsys.readouterr().out


def test_lists_that_contradict_folders_of_splits_are_refused(tmp_path, refused):
    for split, seed in (("train", 0), ("val", 1)):
        make_pictures(tmp_path / "src" / split, 2, seed)
        rename(tmp_path / "src" / split, "p0.png", f"{split}.png")
        rename(tmp_path / "src" / split, "p1.png", f"{split}1.png")
    (tmp_path / "src" / "train.txt").write_text("train\nval")
    argv = [tmp_path / "src", "--out", tmp_path / "f.h5"]
    refused(images.main, argv, "train.txt: case 'val'", "val/images/val.png", "of split 'val'")
    (tmp_path / "src" / "train.txt").write_text("train\n")
    (tmp_path / "src" / "unlabeled.txt").write_text("val\n")
    images.main([str(a) for a in argv])
    assert list(h5.read_info(tmp_path / "f.h5").splits) == ["train", "unlabeled"]
    src = make(make(tmp_path / "nifti", ["a", "b"]), ["c"], tr="Ts")
    (src / "train.txt").write_text("a\nc")
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "train.txt: case 'c'", "imagesTs/c")


def test_names_of_a_mac_are_those_of_lists(tmp_path, refused):
    """An accent may be a character of its own in a file's name, and none in a list."""
    src, out = make_pictures(tmp_path / "src", 3), ["--out", str(tmp_path / "f.h5")]
    (src / "images" / "p0.png").rename(src / "images" / "a\u0308.png")
    (src / "masks" / "p0.png").rename(src / "masks" / "\u00e4.png")
    (src / "train.txt").write_text("\u00e4\np1", encoding="utf-8")
    (src / "val.txt").write_text("p2")
    images.main([str(src), *out])
    info = h5.read_info(tmp_path / "f.h5")
    assert [(e.name, e.labeled) for e in info.entries("train")] == [("\u00e4", True), ("p1", True)]
    twice = tmp_path / "src" / "images" / "\u00e4.png"
    twice.write_bytes(b"")
    refused(images.main, [src, *out], "is there too")
    twice.unlink()
    la_source = la(tmp_path / "la")
    (la_source / "set" / "ID1").rename(la_source / "set" / "a\u0308")
    (la_source / "train.list").write_text("ID0\n\u00e4\nID2\n", encoding="utf-8")
    assert from_lists(la_source).entries("train")[1].name == "\u00e4"
    (src / "images" / os.fsdecode(b"\xe4.png")).write_bytes(b"")
    refused(images.main, [src, *out], "udce4", "not UTF-8; rename it")


def test_names_are_utf8_in_any_locale(tmp_path):
    src = make_pictures(tmp_path / "src", 3)
    rename(src, "p0.png", "\u00e4.png")
    (src / "train.txt").write_text("\u00e4\np1\np2", encoding="utf-8")
    plain = os.environ | dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    done = python("-m", "data.images", src, "--out", tmp_path / "f.h5", env=plain)
    assert done.returncode == 0, done.stderr
    assert h5.read_info(tmp_path / "f.h5").entries("train")[0].name == "\u00e4"


# -------------------------------------------------------------------------------- absent classes


def dataset(path, val, train=(0, 1, 2, 3), count=2):
    """Squares of some classes, one below the other, in some cases of each split.

    Case 0 of val lacks the last of these classes.
    """

    def cases():
        for split, held in (("train", train), ("val", val)):
            for i in range(count):
                label = np.zeros((32, 32), np.uint8)
                for k in held[:-1] if split == "val" and i == 0 and len(held) > 2 else held:
                    label[8 * k : 8 * k + 6, 4:20] = k
                image = np.random.default_rng(i).random(label.shape, np.float32) + label
                yield h5.Case(
                    split=split,
                    name=f"{split}{i}",
                    image=image.astype(np.float32),
                    label=label,
                    patient=f"{split}{i}",
                )

    return h5.write(
        str(path), cases(), name="f", classes=["background", "a", "b", "c"], dims=2, channels=1
    )


def test_mean_dice_leaves_out_what_a_split_does_not_hold(tmp_path, capsys):
    info = dataset(tmp_path / "f.h5", (0, 1, 3))
    held = supervision.held_classes(info, "val")
    assert held.tolist() == [True, False, True] and supervision.held_classes(
        info, "val", ["val0"]
    ).tolist() == [True, False, False]
    assert supervision.held_classes(info, "train").all()
    mean, per_class = inference.mean_dice([[0.5, 1.0, 1.0], [0.3, 1.0, 0.2]], held)
    assert mean == pytest.approx((0.4 + 0.6) / 2) and per_class == pytest.approx([0.4, None, 0.6])
    h5.report(info)
    assert "note: no label of val holds 'b'" in capsys.readouterr().out
    h5.report(dataset(tmp_path / "g.h5", (0, 1), (0, 1, 2)))
    said = capsys.readouterr().out
    assert (
        "note: no label of this file holds 'c': nothing can learn it, and no score" in said
        and "note: no label of val holds 'b': left out of its scores" in said
    )
    assert "of train" not in said
    info = dataset(tmp_path / "i.h5", (0, 1, 2, 3), (0, 1))
    h5.report(info)
    said = capsys.readouterr().out
    assert "no label of train holds 'b', 'c': nothing can learn it, and scores count it" in said
    supervision.check_foreground(info, ["train0"])
    said = capsys.readouterr().out
    assert "no label of the labeled cases holds 'b', 'c', but val does" in said
    supervision.check_foreground(dataset(tmp_path / "k.h5", (0, 1), (0, 1)), ["train0"])
    assert not capsys.readouterr().out


def cases(tmp_path, *found):
    """What the notes say of a file of cases (split, image, label)."""
    every = (
        h5.Case(split, f"c{i}", np.float32(image), label, f"c{i}")
        for i, (split, image, label) in enumerate(found)
    )
    names = ["background", "a"]
    return h5.summary(
        h5.write(str(tmp_path / "c.h5"), every, name="c", classes=names, dims=2, channels=1)
    )


def test_images_that_stand_in_two_splits_or_show_nothing_are_noted(tmp_path):
    a, b, c = np.random.default_rng(0).random((3, 16, 16))
    label = np.eye(16, dtype=np.uint8)
    said = cases(tmp_path, ("train", a, label), ("train", a, label), ("val", b, label))
    assert "note" not in said
    said = cases(tmp_path, ("train", a, label), ("unlabeled", a, None), ("val", b, label))
    assert "note" not in said
    said = cases(tmp_path, ("train", a, label), ("val", b, label), ("val", a, label * 0))
    assert "note: 1 image is in two splits, such as train/c0, which is val/c2, too" in said
    said = cases(tmp_path, ("train", a * 0, label), ("val", a * 0, label), ("test", c, label))
    assert "note: 2 images have one value everywhere, such as train/c0" in said
    assert "two splits" not in said


def test_masks_that_may_be_inverted_are_noted(tmp_path):
    a, b = np.random.default_rng(0).random((2, 16, 16))
    label = np.eye(16, dtype=np.uint8)
    assert "inverted" not in cases(tmp_path, ("train", a, label), ("val", b, 1 - label))
    said = cases(tmp_path, ("train", a, 1 - label), ("val", b, 1 - label))
    assert "note: background is 6% of all pixels: are masks inverted?" in said
    said = cases(tmp_path, ("train", a, label | 1), ("val", b, label))
    assert "note: no label of train holds 'background': is a mask inverted?" in said


def test_a_table_marks_a_class_that_is_absent_and_no_mean_counts_it(
    tmp_path, capsys, unrendered, refused
):
    info, out = dataset(tmp_path / "f.h5", (0, 1, 3)), tmp_path / "out"
    runs = [
        make_run(tmp_path / n, info, seed=s, method=m)
        for n, s, m in (("a", 0, "supervised"), ("b", 1, "ict"))
    ]
    evaluate.main(
        [info.path, *runs, "--out", str(out), "--baseline", "supervised", "--pictures", "1"]
    )
    rows = list(csv.DictReader(open(out / "cases.csv")))
    assert {r["class"] for r in rows} == {"a", "c"} and len(rows) == 2 * 2 * 2
    summary = json.loads((out / "summary.json").read_text())
    for row, path in zip(summary["rows"], runs):
        mine = [r for r in rows if r["checkpoint"] == path]
        for column, key, scale in (
            ("Dice %", "dice", 100),
            ("Jaccard %", "jaccard", 100),
            ("HD95 px", "hd95", 1),
            ("ASD px", "asd", 1),
        ):
            assert row[column] == pytest.approx([scale * np.mean([float(r[key]) for r in mine])])
        assert row["Dice % b"] is None and len(row["Dice % a"]) == len(row["Dice % c"]) == 1
    mean = [np.mean([float(r["dice"]) for r in rows if r["checkpoint"] == path]) for path in runs]
    assert summary["rows"][1]["Δ Dice"] == pytest.approx(100 * (mean[1] - mean[0])) and summary[
        "absent"
    ] == ["b"]
    text = (out / "summary.md").read_text()
    assert (
        "no label of val holds 'b'" in text.split("\n")[-2]
        and " | - | " in text
        and "no label of val" in capsys.readouterr().out
    )
    nothing = dataset(tmp_path / "g.h5", (0,))
    refused(evaluate.main, [nothing.path, runs[0], "--out", out], "g.h5: /val", "no class")


def test_a_region_counts_in_no_mean_and_one_that_is_absent_is_marked(tmp_path, unrendered):
    info = dataset(tmp_path / "f.h5", (0, 1, 3))
    run = make_run(tmp_path / "run", info)
    rows = {}
    for name, options in (
        ("plain", []),
        ("regions", ["--regions", "only b=2;all=a,b,c; ac =1, c"]),
    ):
        evaluate.main([info.path, run, "--out", str(tmp_path / name), *options])
        rows[name] = list(csv.DictReader(open(tmp_path / name / "cases.csv")))
    plain, found = (json.loads((tmp_path / n / "summary.json").read_text()) for n in rows)
    (before,), (after,) = plain["rows"], found["rows"]
    assert list(after) == [*before, "Dice % only b", "Dice % all", "Dice % ac"]
    assert before.items() <= after.items() and found["absent"] == ["b", "only b"]
    assert [r for r in rows["regions"] if r["class"] in "ac" and len(r["class"]) == 1] == rows[
        "plain"
    ]
    for name in ("all", "ac"):
        dice = [100 * float(r["dice"]) for r in rows["regions"] if r["class"] == name]
        assert len(dice) == 2 and after[f"Dice % {name}"] == pytest.approx([np.mean(dice)])
    assert after["Dice % only b"] is None and "only b" not in {r["class"] for r in rows["regions"]}
    text = (tmp_path / "regions" / "summary.md").read_text()
    said = "regions, which no mean over classes counts: only b = b, all = a + b + c, ac = a + c\n"
    assert said in text and text.endswith("holds 'b', 'only b': left out of every mean.\n")
    assert "regions" not in (tmp_path / "plain" / "summary.md").read_text()


def test_names_of_classes_go_before_numbers():
    classes = ["background", "4", "1", "class 3"]
    found = labels.regions_of("a=1;b=4,3 ; c d=2,class 3", classes)
    assert found == {"a": [2], "b": [1, 3], "c d": [2, 3]}


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "--regions: is empty"),
        ("whole", "'whole' is not NAME=CLASSES"),
        ("whole=1;", "'' is not NAME=CLASSES"),
        ("whole=1=2", "'whole=1=2' is not NAME=CLASSES"),
        (" =1", "' =1' is not NAME=CLASSES"),
        ("two\nlines=1", "is not NAME=CLASSES"),
        ("whole=", "'' in 'whole' is no class of the foreground; these are 1 to 3, or"),
        ("core=3;whole=1,,2", "'' in 'whole' is no class"),
        ("whole=1,4", "'4' in 'whole' is no class"),
        ("whole=-1", "'-1' in 'whole' is no class"),
        ("whole=1,tumor", "'tumor' in 'whole' is no class"),
        ("whole=0,1", "'0' in 'whole' is no class"),
        ("whole=1,background", "'background' in 'whole' is no class"),
        ("whole=1;core=2;whole=3", "'whole' is a class or comes twice"),
        ("myocardium=1", "'myocardium' is a class"),
        ("background=1", "'background' is a class"),
    ],
)
def test_bad_regions(text, said, gray, tmp_path, refused):
    """They are refused before a checkpoint is read."""
    argv = [gray, tmp_path / "none.pt", "--regions", text, "--out", tmp_path / "out"]
    refused(evaluate.main, argv, "--regions: ", said)
    assert not (tmp_path / "out").exists()


def test_training_selects_by_the_classes_of_val(tmp_path, capsys, monkeypatch, refused):
    info, values = (
        dataset(tmp_path / "f.h5", (0, 1, 3)),
        iter([[0.2, 1, 0.4], [0.5, 0, 0.5], [0.1, 1, 0.1]]),
    )
    monkeypatch.setattr(inference, "dice_table", lambda *_: [next(values)] * 2)
    argv = [
        "--out",
        str(tmp_path / "run"),
        "--size",
        "32",
        "--width",
        "2",
        "--batch",
        "2",
        "--steps",
        "3",
        "--eval-every",
        "1",
    ]
    train_ssl.main([info.path, *argv])
    assert "note: no label of val holds 'b'" in capsys.readouterr().out
    best = evaluate.load_checkpoint(str(tmp_path / "run" / "best.pt"), "ssl")["best"]
    assert best == dict(dice=0.5, step=2)
    log = list(csv.DictReader(open(tmp_path / "run" / "log.csv")))
    assert [float(r["val_dice"]) for r in log] == pytest.approx([0.3, 0.5, 0.1])
    assert {r["val_b"] for r in log} == {""} and [r["val_c"] for r in log] == ["0.4", "0.5", "0.1"]
    nothing = dataset(tmp_path / "g.h5", (0,))
    refused(
        train_ssl.main,
        [nothing.path, *argv[:1], tmp_path / "o", *argv[2:]],
        "g.h5: /val",
        "no class",
    )


@pytest.mark.parametrize("module", [images, nifti])
def test_lists_that_name_nobody_are_refused(module, tmp_path, refused):
    (tmp_path / "train.txt").touch()
    if module is images:
        make_pictures(tmp_path / "src", 2)
    else:
        make(tmp_path / "src", "ab")
    argv = [tmp_path / "src", "--lists", tmp_path, "--out", tmp_path / "f.h5"]
    refused(module.main, argv, "train.txt names no case")


def test_shares_leave_somebody_to_train_on(tmp_path, refused):
    make_pictures(tmp_path / "src", 3)
    argv = [tmp_path / "src", "--out", tmp_path / "f.h5", "--val", "0.5", "--test", "0.4"]
    refused(
        images.main,
        argv,
        "of 3 patients with labels, 2 would validate and 1 test",
        "smaller shares",
    )


def test_options_of_a_draw_that_is_none_are_noted(tmp_path, capsys):
    """Also those that are given as they are by default."""
    src = make_pictures(tmp_path / "src", 4)
    argv = [str(src), "--out", str(tmp_path / "f.h5")]
    draw = ["--val", "0.5", "--test", "0", "--seed", "9"]
    images.main([*argv, *draw])
    assert "without effect" not in capsys.readouterr().out
    for name, split in (("p0", "train"), ("p1", "val")):
        (src / f"{split}.txt").write_text(name)
    images.main([*argv, *draw])
    said = "note: without effect: --val, --test, --seed; lists say which split a case belongs to"
    assert said in capsys.readouterr().out
    images.main(argv)
    assert "without effect" not in capsys.readouterr().out
    for split in ("train", "val"):
        make_pictures(tmp_path / "folders" / split, 2)
    images.main([str(tmp_path / "folders"), *argv[1:], "--seed", "0"])
    assert "note: without effect: --seed; folders say which" in capsys.readouterr().out
    from_lists(acdc(tmp_path / "acdc"), "--val", "1")
    assert "note: without effect: --val; val.list says who validates" in capsys.readouterr().out


def test_a_listed_case_of_val_needs_a_mask(tmp_path, refused):
    make_pictures(tmp_path / "src", 3)
    names = sorted(p.stem for p in (tmp_path / "src" / "images").iterdir())
    (tmp_path / "src" / "train.txt").write_text(f"{names[0]}\n{names[1]}\n")
    (tmp_path / "src" / "val.txt").write_text(names[2])
    (tmp_path / "src" / "masks" / f"{names[2]}.png").unlink()
    argv = [tmp_path / "src", "--out", tmp_path / "f.h5"]
    refused(images.main, argv, f"val.txt: case '{names[2]}' has no label")


def test_the_last_patients_of_acdc_validate_where_no_list_says_who(tmp_path, refused, capsys):
    src = acdc(tmp_path / "acdc")
    (src / "val.list").unlink()
    info = from_lists(src, "--val", "1")
    patients = {s: [e.patient for e in entries] for s, entries in info.splits.items()}
    assert patients == {"train": ["patient001"], "val": ["patient002"]}
    assert "the last 1 of train_slices.list validate" in capsys.readouterr().out
    refused(
        ssl4mis.main,
        [src, "--out", tmp_path / "g.h5"],
        "--val 8",
        "has only 2 patients; give fewer",
    )
    (src / "train_slices.list").write_text("")
    argv = [src, "--out", tmp_path / "g.h5"]
    refused(ssl4mis.main, argv, "train_slices.list: names no case")
    (src / "val.list").write_text("patient003_frame01\n")
    assert [*from_lists(src).splits] == ["val"]


def test_a_test_case_of_a_patient_that_validates_stays_in_test():
    """h5.write then refuses the patient, who would be in two splits."""
    rows = [
        splits.Row(name, Path(name), None, patient, split)
        for name, patient, split in (("a", "1", "train"), ("b", "2", "train"), ("c", "2", "test"))
    ]
    found = ssl4mis.validating(rows, 1, Path("train.list"))
    assert [row.split for row in found] == ["train", "val", "test"]


def test_only_a_dataset_is_replaced(tmp_path, refused):
    """Not somebody's notes, and not the masks of stage 1, which have classes, too."""
    src = make_pictures(tmp_path / "src", 3)
    notes, masks, pipe = (tmp_path / name for name in ("notes.txt", "vqm.h5", "pipe.h5"))
    notes.write_text("mine")
    with h5py.File(masks, "w") as f:
        f.attrs.update(format=1, stage="vqm", data="a", classes=["background", "b"], channels=1)
    for path in (notes, masks):
        before = path.read_bytes()
        refused(images.main, [src, "--out", path], "this file is no dataset", "choose another")
        assert path.read_bytes() == before
    os.mkfifo(pipe)
    refused(images.main, [src, "--out", pipe], "pipe.h5: a device or pipe, not a file; choose")
    assert pipe.is_fifo()
    for _ in range(2):
        images.main([str(src), "--out", str(tmp_path / "f.h5")])


def test_a_file_without_train_says_so(tmp_path, capsys):
    image = np.float32(np.eye(16))
    case = h5.Case("test", "a", image, np.uint8(image), "a", spacing=np.array([1.0, 2.0]))
    about = dict(name="t", classes=["background", "a"], dims=2, channels=1)
    info = h5.write(tmp_path / "f.h5", [case], **about)
    h5.report(info)
    said = capsys.readouterr().out
    assert "the split train is empty" in said and "the split val is empty" in said
    assert info.entries("test")[0].spacing == (1, 2)
    both = [replace(case, split=s, name=s, patient=s) for s in ("train", "val")]
    for cases in (both[:1], both):  # corrupt.py, too, needs val
        h5.report(h5.write(tmp_path / "g.h5", cases, **about))
        said = capsys.readouterr().out
        assert ("next: python corrupt.py" in said) == (len(cases) == 2) != ("val is empty" in said)


def test_wide_pictures_know_their_source(tmp_path):
    image = np.float32(np.eye(16))
    case = h5.Case("train", "a", image, None, "a", source_grid=(40, 40_000))
    about = dict(name="t", classes=["background", "a"], dims=2, channels=1)
    info = h5.write(str(tmp_path / "f.h5"), [case], **about)
    assert info.entries("train")[0].source_grid == (40, 40_000)
