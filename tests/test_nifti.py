"""data/nifti.py: layouts, no volume silently misread, and masks that lie on their source again."""

import gzip
import json
import struct

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import python
from medpy.metric.binary import hd95

from data import h5, new_images, nifti, space
from data.metrics import score

OBLIQUE = dict(spacing=(1.4, 1.4, 8.0), origin=(-123.25, 41.7, 17.9))


def ball(shape, center, radius, spacing=(1, 1, 1)):
    where = np.moveaxis(np.indices(shape), 0, -1) * spacing
    return (np.linalg.norm(where - np.multiply(center, spacing), axis=-1) < radius).astype(np.uint8)


def save(path, array, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=None):
    """array (D, H, W); spacing, origin and direction as ITK has them (x, y, z)."""
    image = sitk.GetImageFromArray(array)
    (
        image.SetSpacing(spacing),
        image.SetOrigin(origin),
        image.SetDirection(direction or np.eye(3).ravel().tolist()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return image


def make(
    folder, names, suffix="", *, shape=(4, 10, 12), ending=".nii.gz", tr="Tr", labels=True, **place
):
    """A folder of images (noise and a ball) and labels. place: of save()"""
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        label = ball(shape, (2, 5, 4 + i % 4), 2.6)
        save(
            folder / f"images{tr}" / f"{name}{suffix}{ending}",
            (rng.normal(100, 20, shape) + 90 * label).astype(np.float32),
            **place,
        )
        if labels:
            save(folder / f"labels{tr}" / f"{name}{ending}", label, **place)
    return folder


def convert(src, *more):
    out = src.parent / "f.h5"
    nifti.main([str(src), "--out", str(out), *map(str, more)])
    return h5.read_info(str(out))


def load(info, split, name):
    with h5.open_file(info.path) as f:
        return h5.read_case(f, info, split, name)


@pytest.fixture
def oblique(tmp_path):
    """A case of 8 x 1.4 x 1.4 mm, rotated about two axes, with an odd origin.

    -> (folder, the label as ITK has it)
    """
    a, b = np.radians(25), np.radians(-14)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    )
    place, shape = dict(**OBLIQUE, direction=turn.ravel().tolist()), (9, 40, 44)
    label = ball(shape, (4, 18, 23), 20, (8, 1.4, 1.4)) + ball(
        shape, (4, 18, 23), 11, (8, 1.4, 1.4)
    )
    save(
        tmp_path / "src" / "imagesTr" / "p.nii.gz",
        np.random.default_rng(0).normal(0, 1, shape).astype(np.float32) + label,
        **place,
    )
    return tmp_path / "src", save(tmp_path / "src" / "labelsTr" / "p.nii.gz", label, **place)


# ------------------------------------------------------------------------------ layouts


def test_decathlon(tmp_path, capsys):
    src = make(tmp_path / "Task02", ["la_1", "la_2", "la_3", "la_4", "la_5"])
    make(src, ["la_9"], tr="Ts", labels=False), make(src, ["la_7"], labels=False)
    (
        (src / "imagesTr" / "._la_1.nii.gz").write_bytes(b"Mac"),
        (src / "labelsTr" / "._la_1.nii.gz").write_bytes(b"Mac"),
    )
    (src / "dataset.json").write_text(
        json.dumps({"labels": {"0": "background", "1": "left atrium"}})
    )
    info = convert(src)
    said = capsys.readouterr().out
    assert (info.name, info.classes, info.dims, info.channels, info.standardize) == (
        "Task02",
        ["background", "left atrium"],
        3,
        1,
        True,
    )
    assert {s: sum(e.labeled for e in es) for s, es in info.splits.items()} == {
        "train": 4,
        "val": 1,
        "test": 0,
    }
    assert [e.name for e in info.entries("test")] == ["la_9"] and not info.entries("train")[
        -1
    ].labeled
    assert "1 of 7 cases have no label" in said and "la_7" in said and "left atrium 0." in said
    image, label = load(info, "train", info.entries("train")[0].name)
    source = src / info.entries("train")[0].source
    assert (
        label == sitk.GetArrayFromImage(sitk.ReadImage(str(src / "labelsTr" / source.name)))
    ).all() and image.dtype == np.float32
    assert (
        info.entries("train")[0].spacing == (1, 1, 1)
        and info.entries("train")[0].source_grid is None
    )


def test_train_is_in_the_order_of_the_seed_or_of_the_list(tmp_path, refused):
    src = make(tmp_path / "src", [f"c{i}" for i in range(6)])
    make(src, ["t0", "t1"], tr="Ts")
    orders = [[e.name for e in convert(src, "--seed", seed).entries("train")] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    info = convert(src, "--test", ".3")
    assert [e.name for e in info.entries("test")][2:] == ["t0", "t1"] and all(
        e.labeled for e in info.entries("test")
    )
    (
        (src / "train.txt").write_text("c5\nc0\nc3\n"),
        (src / "val.txt").write_text("c1\n"),
        (src / "unlabeled.txt").write_text("t1\n"),
    )
    info = convert(src)
    assert {s: [e.name for e in es] for s, es in info.splits.items()} == {
        "train": ["c5", "c0", "c3"],
        "val": ["c1"],
        "test": ["t0"],
        "unlabeled": ["t1"],
    }
    (src / "labelsTr" / "c1.nii.gz").unlink()
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "val.txt", "c1", "no label")
    (src / "val.txt").write_text("nobody\n")
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "val.txt", "nobody")
    refused(nifti.main, [src, "--out", tmp_path / "g.h5", "--lists", tmp_path / "typo"], "--lists")


def test_nnunet_with_channels(tmp_path, capsys, refused):
    names = ["a_01", "a_02", "a_03"]
    src = make(tmp_path / "src", names, "_0000", ending=".nii")
    for name in names:
        save(
            src / "imagesTr" / f"{name}_0001.nii",
            np.full((4, 10, 12), 0, np.float32) + np.arange(12),
        )
    (src / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ball": 1}}))
    info = convert(src, "--val", ".34")
    said = capsys.readouterr().out
    assert "channels 0 (channel 0), 1 (channel 1); taking all (choose with --channel)" in said
    assert (
        info.classes == ["background", "ball"]
        and sorted(e.name for es in info.splits.values() for e in es) == names
    )
    assert all(e.labeled and e.source.endswith("_0000.nii") for e in info.entries("train"))
    info = convert(src, "--channel", 1)
    assert "--channel" not in capsys.readouterr().out
    image = load(info, "train", info.entries("train")[0].name)[0]
    assert (np.diff(image[0, 0]) >= 0).all() and image[0, 0, 0] < image[0, 0, -1]
    refused(
        nifti.main,
        [src, "--out", tmp_path / "g.h5", "--channel", 2],
        "a_01",
        "no channel 2",
        "0, 1",
    )


def test_decathlon_names_that_look_like_channels(tmp_path):
    src = make(tmp_path / "src", ["case_0001", "case_0002", "case_0003"])
    assert sorted(e.name for es in convert(src, "--val", ".34").splits.values() for e in es) == [
        "case_0001",
        "case_0002",
        "case_0003",
    ]


def test_classes(tmp_path, refused):
    src = make(tmp_path / "src", ["a", "b"])
    save(src / "labelsTr" / "b.nii.gz", ball((4, 10, 12), (2, 5, 5), 2) * 3)
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "labelsTr", "0, 1, 3", "--labels 0,1,3")
    save(src / "labelsTr" / "a.nii.gz", np.resize(np.arange(4, dtype=np.uint8), (4, 10, 12)))
    assert convert(src).classes == ["background", "class 1", "class 2", "class 3"]
    assert convert(src, "--classes", "background,x,y,z").classes == ["background", "x", "y", "z"]
    refused(
        nifti.main,
        [src, "--out", tmp_path / "g.h5", "--classes", "background,x"],
        ".nii.gz: label value",
        "--labels",
    )
    for labels, word in (
        ({"background": 0, "x": 1, "ignore": 2}, "ignore"),
        ({"background": 0, "x": [1, 2], "y": 2}, "regions"),
        ({"1": "background", "2": "x"}, "not named"),
        ({"background": 0, "x": 1, "y": 1}, "0, 1, 1"),
        ({"background": 1, "x": 0}, "is x"),
        ({"background": 0, "x": 1.5}, "regions"),
        ({"0": "background", "1": None}, "regions"),
    ):
        (src / "dataset.json").write_text(json.dumps({"labels": labels}))
        refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "dataset.json", word)
    (src / "dataset.json").write_text("{")
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "dataset.json", "--classes")
    assert convert(src, "--classes", "background,x,y,z").classes == ["background", "x", "y", "z"]


def test_frames_of_a_patient_stay_together(tmp_path, capsys, refused):
    src = make(tmp_path / "src", [f"patient{p}_frame{f}" for p in range(5) for f in (1, 9)])
    info = convert(src, "--patient", r"(patient\d+)_", "--val", ".4", "--dims", 2)
    assert {s: len({e.patient for e in es}) for s, es in info.splits.items()} == {
        "train": 3,
        "val": 2,
    } and info.dims == 2
    assert (
        all(e.patient == e.name.split("_")[0] for es in info.splits.values() for e in es)
        and len(info.entries("val")) == 4
    )
    held_out, kept = info.entries("val")[0].name, info.entries("train")[0].name
    for name in (held_out, kept):
        (src / "labelsTr" / f"{name}.nii.gz").unlink()
    info, said = convert(src, "--patient", r"(patient\d+)_", "--val", ".4"), capsys.readouterr().out
    assert "1 of 10 cases are left out" in said and held_out not in {
        e.name for es in info.splits.values() for e in es
    }
    assert [e.name for e in info.entries("train") if not e.labeled] == [kept] and all(
        e.labeled for e in info.entries("val")
    )
    for regex, word in (
        ("(patient", "not a regular expression"),
        ("patient", "0 groups"),
        (r"(patient[1-4])_", "patient0_frame1"),
    ):
        refused(
            nifti.main, [src, "--out", tmp_path / "g.h5", "--patient", regex], "--patient", word
        )
    assert not (tmp_path / "g.h5").exists()


# ------------------------------------------------------------------------------ space


def test_affine_is_that_of_itk_in_nifti_axes(oblique):
    src, label = oblique
    entry = convert(src).entries("train")[0]
    assert (
        np.allclose(entry.spacing, (8, 1.4, 1.4))
        and entry.grid == (9, 40, 44)
        and entry.affine.dtype == np.float64
    )
    for voxel in ((0, 0, 0), (31, 7, 5)):
        left, posterior, superior = label.TransformIndexToPhysicalPoint(voxel)
        assert np.allclose(
            (entry.affine @ [*voxel, 1])[:3], (-left, -posterior, superior), atol=1e-4
        )


@pytest.mark.parametrize("spacing", [None, "3,1.7,1.1", "8,2,2"])
def test_masks_return_to_the_source(oblique, tmp_path, spacing):
    src, source = oblique
    info = convert(src, *(("--spacing", spacing) if spacing else ()))
    entry, (_, label) = info.entries("train")[0], load(info, "train", "p")
    nifti.write_mask(tmp_path / "out" / "p.nii.gz", label, entry)
    back = sitk.ReadImage(str(tmp_path / "out" / "p.nii.gz"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p.nii.gz"]
    assert back.GetSize() == source.GetSize() and back.GetPixelID() == sitk.sitkUInt8
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(back, get)(), getattr(source, get)(), atol=1e-5), get
    a, b = sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(source)
    if spacing:
        assert np.allclose(
            entry.spacing, [float(s) for s in spacing.split(",")]
        ) and entry.source_grid == (9, 40, 44)
        assert entry.grid == tuple(
            round(n * old / new) for n, old, new in zip((9, 40, 44), (8, 1.4, 1.4), entry.spacing)
        )
        assert all(
            2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum()) > 0.9
            for k in (1, 2)
        )
    else:
        assert entry.source_grid is None and (a == b).all()


def test_resampling_invents_nothing_at_the_borders(tmp_path):
    src = make(tmp_path / "src", ["a"])
    (
        save(
            src / "imagesTr" / "a.nii.gz", np.full((4, 10, 12), 200, np.float32), spacing=(2, 2, 8)
        ),
        save(src / "labelsTr" / "a.nii.gz", np.ones((4, 10, 12), np.uint8), spacing=(2, 2, 8)),
    )
    image, label = load(convert(src, "--spacing", "1,.5,.5", "--intensity", "ct"), "train", "a")
    assert image.shape == (32, 40, 48) and np.ptp(image) < 1e-6 and (label == 1).all()
    save(
        src / "imagesTr" / "a.nii.gz",
        np.zeros((4, 10, 12), np.float32) + np.arange(12, dtype=np.float32),
        spacing=(2, 2, 8),
    )
    image, _ = load(
        convert(src, "--spacing", "8,2,1", "--intensity", "ct", "--clip", "-100,100"), "train", "a"
    )
    assert np.allclose(
        image[0, 0] * 100, np.minimum(np.arange(24) / 2, 11), atol=1e-4
    )  # linear between voxels


def test_hd95_in_mm_is_medpys(oblique):
    entry = (info := convert(oblique[0])).entries("train")[0]
    truth = load(info, "train", "p")[1] == 2
    mask = np.roll(truth, (1, 3, -2), (0, 1, 2))
    mask[:, :17] = False
    assert (
        abs(score(mask, truth, entry.spacing).hd95 - hd95(mask, truth, voxelspacing=entry.spacing))
        < 1e-9
    )
    assert abs(score(mask, truth, entry.spacing).hd95 - hd95(mask, truth)) > 1


@pytest.mark.parametrize("grid, spacing", [((3, 5, 7), (4.0, 2.0, 0.5)), ((5, 7), (2.0, 0.5))])
def test_a_mask_without_affine_has_the_spacing(tmp_path, grid, spacing):
    label = np.random.default_rng(0).integers(
        0, 3, (3, 5, 7)[: 1 if len(grid) == 2 else 3] + grid * (len(grid) == 2), np.uint8
    )
    entry = h5.Entry("a", "a", grid, False, spacing, True, "", 0)
    nifti.write_mask(tmp_path / "a.nii", label, entry)
    image = nibabel.load(tmp_path / "a.nii")
    assert np.allclose(image.affine, np.diag([0.5, 2, 4 if len(grid) == 3 else 1, 1]))
    assert (np.asarray(image.dataobj).T == label).all()


def test_a_failed_mask_leaves_what_was_there(tmp_path, monkeypatch):
    entry = h5.Entry("a", "a", (3, 5, 7), False, (1.0, 1.0, 1.0), True, "", 0)
    nifti.write_mask(tmp_path / "a.nii.gz", np.ones((3, 5, 7), np.uint8), entry)
    before = (tmp_path / "a.nii.gz").read_bytes()

    def fail(*_, **__):
        raise RuntimeError("disk full")

    monkeypatch.setattr(nifti.gzip, "compress", fail)
    with pytest.raises(RuntimeError):
        nifti.write_mask(tmp_path / "a.nii.gz", np.zeros((3, 5, 7), np.uint8), entry)
    assert (tmp_path / "a.nii.gz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="3, 5, 6"):
        nifti.write_mask(tmp_path / "a.nii.gz", np.zeros((3, 5, 6), np.uint8), entry)


# ------------------------------------------------------------------------------ intensity


def test_ct_window_is_the_same_for_all_cases(tmp_path):
    src = make(tmp_path / "src", ["a", "b"])
    values = np.array([-1000, -175, 37.5, 250, 3000], np.float32)
    save(src / "imagesTr" / "a.nii.gz", np.resize(values, (4, 10, 12)))
    info = convert(src, "--intensity", "ct", "--val", 0)
    assert info.standardize is False
    assert np.allclose(load(info, "train", "a")[0].ravel()[:5], [-1, -1, 0, 1, 1], atol=1e-6)
    for clip in (["--clip", "-1000,1000"], ["--clip=-1000,1000"]):
        info = convert(src, "--intensity", "ct", "--val", 0, *clip)
        assert np.allclose(
            load(info, "train", "a")[0].ravel()[:5], [-1, -0.175, 0.0375, 0.25, 1], atol=1e-6
        )


def test_mr_is_clipped_and_standardized(tmp_path):
    src = make(tmp_path / "src", ["a"])
    values = np.random.default_rng(0).normal(500, 30, (4, 10, 12)).astype(np.float32)
    values[0, 0, 0] = 1e6
    save(src / "imagesTr" / "a.nii.gz", values)
    info = convert(src)
    image, expected = load(info, "train", "a")[0], values.clip(*np.percentile(values, (0.5, 99.5)))
    assert (
        info.standardize
        and abs(image.mean()) < 1e-4
        and abs(image.std() - 1) < 1e-4
        and image.max() < 4
    )
    assert np.allclose(image, (expected - expected.mean()) / expected.std(), atol=1e-3)
    save(src / "imagesTr" / "a.nii.gz", np.full((4, 10, 12), 7, np.float32))
    assert not load(convert(src), "train", "a")[0].any()


# ------------------------------------------------------------------------------ refusals


def patch(path, at, *values, kind="f"):
    raw = bytearray(path.read_bytes())
    raw[at : at + struct.calcsize(f"<{len(values)}{kind}")] = struct.pack(
        f"<{len(values)}{kind}", *values
    )
    path.write_bytes(raw)


def joined(*arrays):
    return sitk.JoinSeries([sitk.GetImageFromArray(a) for a in arrays])


def test_volumes_of_four_dimensions_are_channels(tmp_path, refused):
    src, argv = make(tmp_path / "src", ["a"]), [tmp_path / "src", "--out", tmp_path / "g.h5"]
    first = np.random.default_rng(0).normal(0, 1, (4, 10, 12)).astype(np.float32)
    sitk.WriteImage(joined(first, -first), str(src / "imagesTr" / "a.nii.gz"))
    refused(nifti.main, [*argv, "--channel", 2], "a.nii.gz", "no channel 2", "0 to 1")
    images = [load(convert(src, "--channel", c), "train", "a")[0] for c in (0, 1)]
    assert (
        np.allclose(images[0], -images[1], atol=1e-5)
        and np.corrcoef(images[0].ravel(), first.ravel())[0, 1] > 0.99
    )
    sitk.WriteImage(joined(*[(first > 1).astype(np.uint8)] * 2), str(src / "labelsTr" / "a.nii.gz"))
    refused(nifti.main, [*argv, "--channel", 1], "labelsTr/a.nii.gz", "4D")
    make(src, ["a"])
    sitk.WriteImage(sitk.GetImageFromArray(first[0]), str(src / "imagesTr" / "a.nii.gz"))
    refused(nifti.main, argv, "a.nii.gz", "2D")
    sitk.WriteImage(
        sitk.GetImageFromArray(np.stack([first] * 3, -1), isVector=True),
        str(src / "imagesTr" / "a.nii.gz"),
    )
    refused(nifti.main, argv, "a.nii.gz", "3 value(s) per voxel")
    make(src, ["a"], shape=(1, 10, 12))
    assert convert(src).entries("train")[0].grid == (1, 10, 12)
    refused(nifti.main, [*argv, "--channel", 1], "a.nii.gz", "no channel 1")
    assert not (tmp_path / "g.h5").exists()


@pytest.mark.parametrize(
    "change",
    [
        dict(spacing=(1.0, 1.0, 1.1)),
        dict(origin=(0.0, 5.0, 0.0)),
        dict(direction=[0, 1, 0, -1, 0, 0, 0, 0, 1]),
        {},
    ],
)
def test_label_on_another_grid(tmp_path, refused, change):
    src = make(tmp_path / "src", ["a"])
    save(src / "labelsTr" / "a.nii.gz", np.ones((4, 10, 12 if change else 11), np.uint8), **change)
    refused(
        nifti.main,
        [src, "--out", tmp_path / "g.h5"],
        "imagesTr/a.nii.gz",
        "labelsTr/a.nii.gz",
        *change,
        "4 x 10 x 12",
        "4 x 10 x 12" if change else "4 x 10 x 11",
    )
    assert not (tmp_path / "g.h5").exists()


def test_labels_that_are_missing_orphaned_or_no_classes(tmp_path, refused):
    src, argv = make(tmp_path / "src", ["a", "b"]), [tmp_path / "src", "--out", tmp_path / "g.h5"]
    for values, word in (
        (np.full((4, 10, 12), 0.5, np.float32), "0.5"),
        (np.full((4, 10, 12), 256, np.int16), "256"),
        (np.full((4, 10, 12), -1, np.int16), "-1"),
        (np.full((4, 10, 12), np.nan, np.float32), "NaN"),
    ):
        save(src / "labelsTr" / "b.nii.gz", values)
        refused(nifti.main, argv, "labelsTr/b.nii.gz", word)
        refused(nifti.main, [*argv, "--classes", "background,x"], "labelsTr/b.nii.gz", word)
    (src / "imagesTr" / "b.nii.gz").unlink()
    refused(nifti.main, argv, "labelsTr/b.nii.gz", "no image")
    for path in (src / "labelsTr").iterdir():
        path.unlink()
    refused(nifti.main, argv, "no case has a label", "labelsTr")
    (src / "imagesTr" / "a.nii.gz").unlink()
    refused(nifti.main, argv, "imagesTr", "no .nii")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_names_that_come_twice(tmp_path, refused):
    src = make(make(tmp_path / "src", ["a"]), ["a"], ending=".nii")
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "a.nii.gz", "a.nii is there too")
    src = make(make(tmp_path / "other", ["a"]), ["a"], tr="Ts")
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "'a'", "both imagesTr and imagesTs")


def test_files_that_are_not_read_are_noted(tmp_path, capsys):
    """Endings may have capitals. New volumes are found alike."""
    src, data = tmp_path / "src", dict(classes=["background", "x"], dims=3, channels=1)
    for name, ending in (("a", ".NII.GZ"), ("b", ".Nii"), ("c", ".nii.gz")):
        pair(src, name, ending=ending, **STRAIGHT)
    info = convert(src, "--val", 0)
    assert sorted(e.name for e in info.entries("train")) == ["a", "b", "c"]
    assert "not read" not in capsys.readouterr().out
    for name in ("labelsTr/c.mha", "labelsTr/d.dcm", "imagesTs/e.nrrd", "imagesTr/f.dcm"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).touch()
    convert(src, "--val", 0)
    new_images.convert(str(src / "imagesTr"), str(tmp_path / "n.h5"), data | dict(prepared=None))
    one = new_images.convert(str(src / "imagesTr" / "a.NII.GZ"), str(tmp_path / "o.h5"), data)
    said, name = capsys.readouterr().out, src / "imagesTr" / "f.dcm"
    for words in ("4 of 10", "1 of 4"):
        assert f"note: {words} files and folders are not read, such as {name}; only files" in said
    assert one.entries("unlabeled")[0].name == "a"


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("part", ["images", "labels"])
def test_truncated_files(tmp_path, refused, ending, part):
    src = make(tmp_path / "src", ["a"], ending=ending)
    path = src / f"{part}Tr" / f"a{ending}"
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 30, 0):
        path.write_bytes(whole[:size])
        refused(nifti.main, [src, "--out", tmp_path / "g.h5"], path.name, "truncated")
    path.write_bytes(b"no volume" * 200)
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], path.name, "not a NIfTI-1 file")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("value", [0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("axis", [1, 3])
def test_spacing_that_is_none(tmp_path, refused, value, axis):
    src = make(tmp_path / "src", ["a"], ending=".nii")
    patch(src / "imagesTr" / "a.nii", 76 + 4 * axis, value)
    refused(
        nifti.main, [src, "--out", tmp_path / "g.h5"], "imagesTr/a.nii", "spacing", f"{value:g}"
    )


def test_voxels_of_a_type_that_is_no_number(tmp_path, refused):
    src = make(tmp_path / "src", ["a"], ending=".nii")
    patch(src / "imagesTr" / "a.nii", 70, 1536, kind="h")  # of 128 bits
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "imagesTr/a.nii", "float128", "1536")


@pytest.mark.parametrize("value, kind", [(np.nan, np.float32), (np.inf, np.float64)])
def test_broken_voxels_are_not_taken_for_zero(tmp_path, refused, value, kind):
    src = make(tmp_path / "src", ["a"])
    values = np.ones((4, 10, 12), kind)
    values[-1, -1, -1] = value
    save(src / "imagesTr" / "a.nii.gz", values)
    refused(
        nifti.main,
        [src, "--out", tmp_path / "g.h5", "--intensity", "ct"],
        "imagesTr/a.nii",
        "infinite",
    )


def test_big_endian_files_are_understood(tmp_path, refused):
    src = make(tmp_path / "src", ["a"], ending=".nii")
    path = src / "imagesTr" / "a.nii"
    old, (image, _) = path.read_bytes(), load(convert(src), "train", "a")
    big = bytearray(old)
    for start, end, width in (
        (0, 4, 4),
        (40, 56, 2),
        (68, 76, 2),
        (76, 120, 4),
        (252, 256, 2),
        (256, 328, 4),
        (352, len(old), 4),
    ):
        big[start:end] = np.frombuffer(old[start:end], f"<u{width}").byteswap().tobytes()
    path.write_bytes(big)
    assert (load(convert(src), "train", "a")[0] == image).all()
    path.write_bytes(big[:-1])
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "a.nii", "truncated, ")


@pytest.mark.parametrize(
    "more, words",
    [
        (["--spacing", "1,0,1"], ["--spacing: 1,0,1", "above 0"]),
        (["--spacing", "1,1"], ["--spacing"]),
        (["--spacing", "a,b,c"], ["--spacing"]),
        (["--spacing", "1,nan,1"], ["--spacing"]),
        (["--clip", "-100,100"], ["--clip", "ct"]),
        (["--intensity", "ct", "--clip", "9"], ["--clip"]),
        (["--intensity", "ct", "--clip", "5,-5"], ["--clip", "lower"]),
        (["--val", ".6", "--test", ".4"], ["--val"]),
    ],
)
def test_options_that_contradict(tmp_path, refused, more, words):
    refused(nifti.main, [make(tmp_path / "src", ["a"]), "--out", tmp_path / "g.h5", *more], *words)
    assert not (tmp_path / "g.h5").exists()


def test_as_a_command(tmp_path, refused):
    src = make(tmp_path / "src", ["a", "b"], ending=".nii")
    done = python("-m", "data.nifti", src, "--out", tmp_path / "f.h5", "--val", ".5")
    assert (
        done.returncode == 0
        and "grid 4 x 10 x 12, spacing 1 x 1 x 1 mm" in done.stdout
        and not done.stderr
    )
    patch(src / "imagesTr" / "a.nii", 80, 0.0)
    done = python("-m", "data.nifti", src, "--out", tmp_path / "g.h5")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "spacing" in done.stderr
    refused(nifti.main, [tmp_path / "nothing", "--out", tmp_path / "g.h5"], "no such folder")


def test_nnunet_images_without_a_channel(tmp_path, refused):
    src = make(tmp_path / "src", ["a", "b", "c"], suffix="_0000")
    make(src, ["late"], tr="Ts", labels=False)
    refused(nifti.main, [src, "--out", tmp_path / "f.h5"], "late.nii.gz", "no channel")


def test_few_labeled_volumes_still_have_one_to_validate_on(tmp_path):
    src = make(tmp_path / "src", ["a", "b", "c"])
    make(src, ["d", "e", "f"], labels=False)
    assert {s: len(es) for s, es in convert(src).splits.items()} == {"train": 5, "val": 1}


def test_volumes_of_different_orientation_are_pointed_out(tmp_path, capsys):
    src = make(tmp_path / "src", ["a", "b", "c"], shape=(9, 10, 12))
    convert(src)
    assert "body axes" not in capsys.readouterr().out
    make(src, ["d"], shape=(9, 10, 12), direction=[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    convert(src)
    assert "body axes" in capsys.readouterr().out


# ------------------------------------------------------------------------------ headers

COS, SIN = np.cos(0.3), np.sin(0.3)
SFORM = dict(
    sform_code=2,
    srow_x=[0.8 * COS, -0.8 * SIN, 0, 30],
    srow_z=[0, 0, 2.5, 12],
    srow_y=[0.8 * SIN, 0.8 * COS, 0, -20],
    pixdim=[1, 0.8, 0.8, 2.5, 0, 0, 0, 0],
)
QFORM = dict(
    qform_code=1,
    quatern_b=0.5,
    quatern_c=0.1,
    quatern_d=-0.3,
    qoffset_y=-7,
    pixdim=[-1, 0.8, 0.8, 2.5, 0, 0, 0, 0],
)
PLAIN = dict(pixdim=[1, 0.8, 0.8, 2.5, 0, 0, 0, 0])  # both codes 0
STRAIGHT = PLAIN | dict(qform_code=1)  # along the body's axes
IDENTITY = dict(sform_code=1, srow_x=[1, 0, 0, 0], srow_y=[0, 1, 0, 0], srow_z=[0, 0, 1, 0])
MICRONS = dict(qform_code=1, xyzt_units=3)
PLACE = [
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
    "pixdim",
    "xyzt_units",
]


def nii(path, values, order="<", **fields):
    """A file of values (D, H, W) whose header has the fields that are given, wrong ones too."""
    header = nibabel.Nifti1Header(endianness=order)
    header["dim"] = [values.ndim, *values.shape[::-1], *[1] * (7 - values.ndim)]
    header.set_data_dtype(values.dtype)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header["descrip"], header["db_name"] = b"Doe, Jane", b"1970-01-01"
    for name, value in fields.items():
        header[name] = value
    raw = header.binaryblock + bytes(4) + values.astype(values.dtype.newbyteorder(order)).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)
    return path


def pair(folder, name="a", shape=(9, 10, 12), ending=".nii.gz", order="<", **fields):
    """An image and its label, with one header. -> label (D, H, W)"""
    rng = np.random.default_rng(len(name))
    label = (rng.random(shape) > 0.7).astype(np.uint8)
    image = (100 * label + rng.integers(-90, 90, shape)).astype(np.int16)
    nii(folder / "imagesTr" / f"{name}{ending}", image, order, **fields)
    nii(folder / "labelsTr" / f"{name}{ending}", label, order, **fields)
    return label


def header_of(path):
    return nibabel.Nifti1Header(nifti.bytes_of(path, 348), check=False)


def same_point(a, b, voxel):
    """Whether nibabel and ITK both find a voxel of two files at one place in the body."""
    ours, theirs = (nibabel.load(p).affine @ [*voxel, 1] for p in (a, b))
    itk = [sitk.ReadImage(str(p)).TransformIndexToPhysicalPoint(voxel) for p in (a, b)]
    return np.allclose(ours, theirs, atol=1e-6) and np.allclose(*itk, atol=1e-6)


@pytest.mark.parametrize(
    "ending, order, fields",
    [
        (".nii.gz", "<", SFORM),
        (".nii", ">", QFORM),
        (".nii", "<", QFORM | SFORM),
        (".nii.gz", "<", PLAIN),
        (".nii.gz", ">", PLAIN | SFORM | dict(sform_code=0)),
        (".nii", "<", SFORM | dict(sform_code=4, qform_code=1, qoffset_x=12)),
        (".nii", "<", MICRONS),
        (".nii", "<", QFORM | dict(dim=[6, 12, 10, 9, 1, 1, 1, 1])),
        (".nii.gz", "<", STRAIGHT | dict(xyzt_units=10, toffset=3, cal_max=9, intent_code=1002)),
    ],
)
def test_masks_have_the_header_of_their_source(ending, order, fields, tmp_path):
    """Its place byte for byte, so that every reader finds the mask where it finds the source."""
    label = pair(tmp_path / "src", ending=ending, order=order, **fields)
    pair(tmp_path / "src", "other", shape=(9, 9, 9), **STRAIGHT)
    source = tmp_path / "src" / "labelsTr" / f"a{ending}"
    mask = tmp_path / "masks" / f"a{ending}"
    info = convert(tmp_path / "src", "--val", 0)
    (entry,) = (e for e in info.entries("train") if e.name == "a")
    nifti.write_mask(mask, load(info, "train", "a")[1], entry)
    theirs, ours = header_of(source), header_of(mask)
    assert [k for k in PLACE if theirs[k].tobytes() != ours[k].tobytes()] == []
    assert same_point(mask, source, (3, 7, 2))
    found = nibabel.load(mask)
    assert found.get_data_dtype() == np.uint8 and (np.asarray(found.dataobj).T == label).all()
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(mask))) == label).all()
    assert b"Doe" not in nifti.bytes_of(mask) and b"Doe" not in entry.nifti_header.tobytes()
    assert (ours["cal_max"], ours["toffset"], ours["intent_code"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        SFORM,
        QFORM,
        QFORM | SFORM,
        QFORM | dict(pixdim=[0, 0.8, 0.8, 2.5, 0, 0, 0, 0]),
        SFORM | dict(sform_code=0, qform_code=2, quatern_c=0.4),
        MICRONS | dict(quatern_d=0.7),
    ],
)
def test_the_affine_is_that_of_nibabel_in_mm(fields, tmp_path):
    path = nii(tmp_path / "a.nii", np.zeros((3, 4, 5), np.int16), **fields)
    want = nibabel.load(path).affine[:3] * (1e-3 if "xyzt_units" in fields else 1)
    assert np.allclose(nifti.load(path).affine[:3], want, rtol=0, atol=1e-9)


def test_a_mask_of_one_volume_of_four_dimensions(tmp_path):
    src = tmp_path / "src"
    label = pair(src, **QFORM)
    values = np.stack([np.zeros_like(label), label]).astype(np.float32)
    fields = QFORM | dict(pixdim=[-1, 0.8, 0.8, 2.5, 3, 0, 0, 0])
    nii(src / "imagesTr" / "a.nii.gz", values, **fields)
    info = convert(src, "--channel", 1)
    nifti.write_mask(tmp_path / "a.nii.gz", label, info.entries("train")[0])
    assert nibabel.load(tmp_path / "a.nii.gz").shape == (12, 10, 9)
    assert same_point(tmp_path / "a.nii.gz", src / "labelsTr" / "a.nii.gz", (3, 7, 2))


@pytest.mark.parametrize(
    "fields, words",
    [
        (SFORM | dict(pixdim=[1] * 8), ["contradicts", "1 x 1 x 1", "0.8 x 0.8 x 2.5"]),
        (
            SFORM | dict(srow_x=[0.8, 0.2, 0, 0], srow_y=[0, 0.775, 0, 0]),
            ["right angles", "resample"],
        ),
        (SFORM | dict(srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4), ["sform", "0 x 0 x 0"]),
        (SFORM | dict(srow_x=[np.nan] * 4), ["sform", "NaN"]),
        (STRAIGHT | dict(quatern_c=np.nan), ["qform", "NaN"]),
        (STRAIGHT | dict(quatern_c=1.5), ["qform", "quaternion"]),
        (STRAIGHT | dict(qoffset_x=np.inf), ["qform", "infinite"]),
        (STRAIGHT | dict(qform_code=7), ["codes [7, 0]"]),
        (dict(xyzt_units=6), ["xyzt_units", "6"]),
        (dict(xyzt_units=1), ["1000 x 1000 x 1000 mm", "xyzt_units"]),
        (dict(dim=[3, 12, -10, 9, 1, 1, 1, 1]), ["dim", "-10"]),
        (dict(dim=[0] * 8), ["dim"]),
        (dict(dim=[2, 12, 90, 1, 1, 1, 1, 1]), ["2D"]),
        (dict(dim=[5, 12, 10, 3, 1, 3, 1, 1]), ["5D", "3 value"]),
        (dict(vox_offset=np.nan), ["vox_offset"]),
        (dict(vox_offset=0), ["vox_offset"]),
        (dict(magic=b"ni1"), [".img", "one .nii"]),
        (dict(magic=b""), ["Analyze"]),
        (dict(sizeof_hdr=540), ["NIfTI-2", "save it as NIfTI-1"]),
        (dict(scl_slope=1, scl_inter=np.inf), ["scl_inter"]),
        (dict(scl_slope=3e38), ["float32"]),
        (dict(scl_slope=1, scl_inter=2**31), ["imagesTr", "float32 cannot hold or tell apart"]),
        (dict(datatype=32), ["complex64"]),
        (dict(datatype=128), ["RGB"]),
        (dict(datatype=77), ["unknown", "77"]),
        (dict(datatype=2), ["uint8 (datatype)", "16 bits (bitpix)"]),
        (dict(dim=[3, 12, 10, 8, 1, 1, 1, 1]), ["240 bytes beyond", "dim, datatype"]),
    ],
)
def test_headers_that_cannot_be_trusted(fields, words, tmp_path, refused):
    """One line that names file, place and remedy, and nothing of a library on the screen."""
    pair(tmp_path / "src")
    values = np.full((9, 10, 12), 2, np.int16)
    nii(tmp_path / "src" / "imagesTr" / "a.nii.gz", values, **fields)
    argv = [tmp_path / "src", "--out", tmp_path / "g.h5"]
    refused(nifti.main, argv, "imagesTr/a.nii.gz", ";", *words)
    assert not (tmp_path / "g.h5").exists()


@pytest.mark.parametrize("more", [bytes(999), b"\n", b"x" * 23])
def test_a_little_behind_the_voxels_is_no_matter(more, tmp_path):
    """Zeros, or less than a row. Neither is a size of voxels in bits that is not set."""
    values = np.full((3, 4, 12), 2, np.int16)
    path = nii(tmp_path / "a.nii", values, bitpix=0)
    path.write_bytes(path.read_bytes() + more)
    assert (nifti.load(path).values == 2).all()


@pytest.mark.parametrize("kind", ["int8", "uint16", "int32", "uint64", "float32", "float64"])
def test_voxels_are_those_of_the_file(kind, tmp_path):
    """Of every type, in both orders of bytes, with slope and intercept; 0 and NaN are no slope."""
    values = np.random.default_rng(0).integers(0, 100, (4, 10, 12)).astype(kind)
    for order, slope, inter in (("<", 2, -30), (">", 1, 0), ("<", 0, 5), (">", np.nan, np.nan)):
        path = nii(tmp_path / "a.nii", values, order, scl_slope=slope, scl_inter=inter)
        found = nifti.load(path).values
        want = values * float(slope) + inter if slope in (1, 2) else values
        assert (found == want).all() and found.dtype.isnative
    packed = tmp_path / "b.nii"  # gzip inside, whatever the name says
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert (nifti.load(packed).values == values).all()


def test_micrometers_and_meters_become_mm(tmp_path):
    """Spacing, distances and --spacing are in mm, whatever the header's unit."""
    pair(tmp_path / "src", pixdim=[1, 800, 800, 2500, 0, 0, 0, 0], **MICRONS)
    pair(tmp_path / "src", "meter", pixdim=[1, 8e-4, 8e-4, 25e-4, 0, 0, 0, 0], xyzt_units=1)
    info = convert(tmp_path / "src", "--val", 0)
    for entry in info.entries("train"):
        assert np.allclose(entry.spacing, (2.5, 0.8, 0.8))
    a, b = np.zeros((2, 9, 10, 12), bool)
    a[3, 4, 4] = b[3, 4, 7] = True
    assert score(a, b, entry.spacing).hd95 == pytest.approx(2.4)
    entries = convert(tmp_path / "src", "--val", 0, "--spacing", "2.5,.4,.4").entries("train")
    assert {e.grid for e in entries} == {(9, 20, 24)}


# ------------------------------------------------------------------------------ body axes

AXES = {
    "SAR": np.eye(3),
    "SPL": np.diag([-1, -1, 1]),
    "RSA": [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
    "LIP": [[0, 0, -1], [-1, 0, 0], [0, -1, 0]],
    "AIL": [[-1, 0, 0], [0, 0, 1], [0, -1, 0]],
}


def stored_along(path, axes, image, sides=(1.0, 1.0, 1.0), tilt=0.1, **more):
    """A volume (D, H, W) whose voxels lie along SAR, as a file along other axes of the body."""
    c, s = np.cos(tilt), np.sin(tilt)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * sides[::-1]
    affine[:3, 3] = 5, -8, 3
    wanted = nibabel.orientations.axcodes2ornt(axes[::-1])
    file = nibabel.Nifti1Image(np.ascontiguousarray(image.T), affine).as_reoriented(wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.to_filename(path)
    return path


@pytest.mark.parametrize("axes", AXES)
def test_letters_of_axes_are_those_of_d_h_and_w(axes):
    affine = np.eye(4)
    affine[:3, :3] = AXES[axes]
    assert space.axes_of(affine) == axes and space.are_axes(axes)
    assert not any(map(space.are_axes, ("SAS", "SA", "sar", "SAX", ["S", "A", "R"], None)))


@pytest.mark.parametrize("spacing", [None, "1.2,1,.9"])
def test_volumes_along_other_axes_are_turned_and_their_masks_turned_back(spacing, tmp_path, capsys):
    """All are stored as most are; a mask is on the axes of its own source."""
    rng, src = np.random.default_rng(0), tmp_path / "src"
    image = rng.normal(0, 100, (9, 10, 12)).astype(np.float32)
    label = ball(image.shape, (4, 5, 7), 3.2)
    names = {**{f"most{i}": "SAR" for i in range(6)}, **{f"is{axes}": axes for axes in AXES}}
    for name, axes in names.items():
        for part, values in (("images", image), ("labels", label)):
            stored_along(src / f"{part}Tr" / f"{name}.nii", axes, values)
    info = convert(src, "--val", 0, *(("--spacing", spacing) if spacing else ()))
    said = capsys.readouterr().out
    assert info.prepared["axes"] == "SAR" and "4 of 11 volumes lie along other body axes" in said
    assert "unequal spacing" not in said
    want = load(info, "train", "most0")
    for entry in info.entries("train"):
        found = load(info, "train", entry.name)
        assert np.allclose(found[0], want[0], atol=1e-5) and (found[1] == want[1]).all()
        source, mask = src / "labelsTr" / f"{entry.name}.nii", tmp_path / f"{entry.name}.nii"
        nifti.write_mask(mask, found[1], entry)
        shape = nibabel.load(source).shape
        assert nibabel.load(mask).shape == shape and same_point(mask, source, (1, 2, 3))
        values, truth = (np.asarray(nibabel.load(p).dataobj) for p in (mask, source))
        shared = 2 * (values & truth).sum() / (values.sum() + truth.sum())
        assert shared > 0.85 if spacing else (values == truth).all()
        if spacing:
            assert (h5.read_source_label(info, "train", entry) == label).all()


def test_axes_may_be_chosen(tmp_path, refused):
    label = ball((9, 10, 12), (4, 5, 7), 3.2)
    for part, values in (("images", np.float32(label)), ("labels", label)):
        stored_along(tmp_path / "src" / f"{part}Tr" / "a.nii", "SAR", values)
    info = convert(tmp_path / "src", "--val", 0, "--axes", "IPL")
    assert info.prepared["axes"] == "IPL"
    assert (load(info, "train", "a")[1] == label[::-1, ::-1, ::-1]).all()
    refused(
        nifti.main, [tmp_path / "src", "--out", tmp_path / "x.h5", "--axes", "SAX"], "--axes SAX"
    )


def test_slices_that_are_cut_another_way_have_their_own_words(tmp_path, capsys):
    src, sides = tmp_path / "src", (3.0, 1.0, 1.0)
    label = ball((9, 10, 12), (4, 5, 6), 3)
    for name, axes, shape in (("a", "SAR", 0), ("b", "SAR", 0), ("c", "SPL", 0), ("d", "RSA", 1)):
        for part in ("images", "labels"):
            values = label if part == "labels" else np.float32(label) * 50 - 9
            path = src / f"{part}Tr" / f"{name}.nii"
            if shape:  # a scan whose slices are sagittal
                stored_along(path, axes, values, (1.0, 1.0, 3.0))
            else:
                stored_along(path, axes, values, sides)
    entries = convert(src, "--val", 0).entries("train")
    said = capsys.readouterr().out
    assert "2 of 4 volumes lie along other body axes" in said
    assert "1 of 4 volumes had to swap axes of unequal spacing" in said and "(the first: d)" in said
    assert {e.name: e.spacing for e in entries}["c"] == pytest.approx(sides, rel=1e-6)
    assert {e.name: e.spacing for e in entries}["d"] == pytest.approx((1, 1, 3), rel=1e-6)


def test_a_turned_volume_of_too_few_voxels_in_a_slice(tmp_path, refused):
    src = make(tmp_path / "src", ["a", "b", "c"], shape=(4, 10, 12))
    make(src, ["d"], shape=(4, 10, 12), direction=[0.0, 0, 1, 1, 0, 0, 0, 1, 0])
    argv = [src, "--out", tmp_path / "g.h5"]
    refused(nifti.main, argv, "imagesTr/d.nii.gz", "turned", "10 x 12 x 4")


def test_volumes_that_know_no_axes_are_taken_as_they_are(tmp_path, capsys):
    """With a note, where others know theirs and where none does."""
    label = pair(tmp_path / "src", "lost", **PLAIN)
    info = convert(tmp_path / "src", "--val", 0)
    assert info.prepared["axes"] is None
    assert "note: no volume has an orientation" in capsys.readouterr().out
    pair(tmp_path / "src", "placed", **STRAIGHT | dict(quatern_d=1))
    info = convert(tmp_path / "src", "--val", 0)
    assert info.prepared["axes"] == "SPL"
    assert (load(info, "train", "lost")[1] == label).all()
    said = capsys.readouterr().out
    assert "1 of 2 volumes have no orientation" in said and "(the first: lost)" in said


def test_two_places_are_pointed_out(tmp_path, capsys):
    pair(
        tmp_path / "src",
        "same",
        **STRAIGHT
        | dict(
            sform_code=1, srow_x=[0.8, 0, 0, 0], srow_y=[0, 0.8, 0, 1e-7], srow_z=[0, 0, 2.5, 0]
        ),
    )
    convert(tmp_path / "src", "--val", 0)
    assert "sform that differ" not in capsys.readouterr().out
    pair(tmp_path / "src", "two", **SFORM | dict(qform_code=1))
    convert(tmp_path / "src", "--val", 0)
    assert "1 of 2 volumes have a qform and an sform that differ" in capsys.readouterr().out


# ------------------------------------------------------------------------------ Hounsfield units


def ct(shift=0, padding=None, scale=1, noise=15):
    """A body of soft tissue, fat, lung and bone in air, as a scanner would store it."""
    rng, shape = np.random.default_rng(0), (9, 24, 24)
    values = np.full(shape, -1000.0)
    for center, radius, level in (
        ((4, 12, 12), 9, 40),
        ((4, 12, 7), 3, -800),
        ((4, 6, 12), 2, -100),
        ((4, 16, 12), 2, 700),
    ):
        values[ball(shape, center, radius, (0, 1, 1)) > 0] = level
    values = np.maximum(values + rng.normal(0, noise, shape), -1024) * scale + shift
    if padding is not None:
        values[ball(shape, (4, 12, 12), 11, (0, 1, 1)) == 0] = padding
    return values


def two_paddings(values):
    """One around the field of view, another one in a corner of it."""
    values[:, :3], values[:, -3:, :9] = -2000, -3024
    return values


@pytest.mark.parametrize(
    "values, why",
    [
        (ct(), None),
        (ct(padding=-3024), None),
        (ct()[:, 8:16, 4:20], None),
        (ct(1024), "0 or more"),
        (ct(1024, padding=-2000), "0 or more"),
        (ct(1000), "below -200, as air is, and 39% above 600"),
        (ct(1000, padding=-2000), "below -200"),
        (ct(1000, noise=30), "below -200"),
        (ct(1010, noise=30), "below -200"),
        (ct(noise=30), None),
        (ct()[:, 12:22, 4:20], None),  # without air
        (ct(scale=1 / 1000), "are all between"),
        (ct(9000, padding=-2000), "0 or more"),
        (ct(-5000), "outside of the window"),
        (np.zeros((9, 24, 24)), "are all between"),
        (two_paddings(ct(1024)), "0 or more"),
        (two_paddings(ct()), None),
    ],
)
def test_a_ct_that_is_not_in_hounsfield_units_is_pointed_out(values, why, tmp_path, capsys):
    for name, image in (("a", ct()), ("b", values)):
        nii(tmp_path / "src" / "imagesTr" / f"{name}.nii", image.astype(np.float32), **STRAIGHT)
        nii(tmp_path / "src" / "labelsTr" / f"{name}.nii", np.uint8(image > 0), **STRAIGHT)
    convert(tmp_path / "src", "--val", 0)
    assert "Hounsfield" not in capsys.readouterr().out
    convert(tmp_path / "src", "--val", 0, "--intensity", "ct")
    said = capsys.readouterr().out
    assert "Hounsfield" not in said if why is None else "1 of 2 volumes do not look like" in said
    assert why is None or "(the first: b, " in said and why in said


# ------------------------------------------------------------------------------ doubtful headers


@pytest.mark.parametrize(
    "fields, words",
    [
        (STRAIGHT, None),
        (PLAIN, None),
        (IDENTITY, "knows no place: voxels of 1 x 1 x 1 mm"),
        ({}, "knows no place"),
        (IDENTITY | dict(srow_x=[1, 0, 0, -90]), None),
        (STRAIGHT | dict(pixdim=[1, 2e-3, 2e-3, 2e-3, 0, 0, 0, 0]), "are less than 2 mm long"),
        (MICRONS | dict(pixdim=[1, 0.8, 0.8, 2.5, 0, 0, 0, 0]), "wrong unit"),
        (MICRONS | dict(pixdim=[1, 800, 800, 2500, 0, 0, 0, 0]), None),
    ],
)
def test_a_spacing_that_is_lost_or_of_a_wrong_unit_is_noted(fields, words, tmp_path, capsys):
    for name in ("a", "b", "c"):
        pair(tmp_path / "src", name, **fields)
    convert(tmp_path / "src", "--val", 0)
    said = capsys.readouterr().out
    usual = said.count("note: no volume has an orientation") + said.count("note: the split val is")
    assert said.count("note:") - usual == (words is not None)
    assert words is None or words in said and "note: 3 of 3 volumes" in said


def test_one_slice_is_noted_where_volumes_are_segmented(tmp_path, capsys):
    pair(tmp_path / "src", shape=(1, 10, 12), **STRAIGHT)
    convert(tmp_path / "src", "--val", 0, "--dims", 2)
    assert "have one slice alone" not in capsys.readouterr().out
    convert(tmp_path / "src", "--val", 0)
    assert "note: 1 of 1 volumes have one slice alone" in capsys.readouterr().out
    pair(tmp_path / "deep", shape=(4, 10, 12), **STRAIGHT)
    for spacing, noted in ((1, False), (50, True)):  # along the body
        convert(tmp_path / "deep", "--val", 0, "--spacing", f"{spacing},1,1")
        assert ("have one slice alone" in capsys.readouterr().out) == noted


def test_a_spacing_that_leaves_too_little_is_refused(tmp_path, refused):
    pair(tmp_path / "src", **STRAIGHT)
    argv = [tmp_path / "src", "--out", tmp_path / "g.h5", "--spacing", "2.5,4,4"]
    refused(nifti.main, argv, "a.nii.gz", "9 x 10 x 12", "9 x 2 x 2", "with a smaller --spacing")


def test_doubtful_new_volumes_are_noted(tmp_path, capsys):
    src, data = tmp_path / "src", dict(classes=["background", "x"], dims=3, channels=1)
    data["prepared"] = {"from": "nifti", "spacing": None, "window": None}
    for name in ("a", "a_seg"):
        nii(src / "imagesTs" / f"{name}.nii", np.zeros((1, 10, 12), np.int16), **STRAIGHT)
    nii(src / "imagesTr" / "b.nii", np.zeros((9, 10, 12), np.int16), **STRAIGHT)
    info = new_images.convert(str(src), str(tmp_path / "f.h5"), data)
    said = capsys.readouterr().out
    assert [e.name for e in info.entries("unlabeled")] == ["a", "a_seg"]
    for words in (
        f"images of {src / 'imagesTs'} alone are taken; those of {src / 'imagesTr'} need",
        "1 of 2 files have names of masks, such as",
        "2 of 2 volumes have one slice alone",
        "2 images have one value everywhere, such as a",
    ):
        assert f"note: {words}" in said


# ------------------------------------------------------------------------------ grids of labels


@pytest.mark.parametrize(
    "image, label, shape, words",
    [
        (
            SFORM,
            PLAIN,
            (9, 10, 12),
            ["the label's header has lost", "copy the image's header", "not resample"],
        ),
        (
            SFORM,
            IDENTITY,
            (9, 10, 12),
            ["spacing [1.0, 1.0, 1.0], not [0.8, 0.8, 2.5]", "the label's header has lost"],
        ),
        (PLAIN, QFORM, (9, 10, 12), ["the image's header has lost", "copy the label's header"]),
        (
            SFORM,
            SFORM | dict(srow_x=[0.8 * COS, -0.8 * SIN, 0, 31]),
            (9, 10, 12),
            ["origin", "match voxel by voxel", "else resample"],
        ),
        (
            SFORM,
            PLAIN,
            (9, 10, 11),
            ["size [11, 10, 9], not [12, 10, 9]", "; resample the label to the image"],
        ),
        (MICRONS, MICRONS | dict(qoffset_x=0.8), (9, 10, 12), ["origin [0.0008"]),
        (
            MICRONS,
            MICRONS | dict(pixdim=[1, 1.1, 1, 1, 0, 0, 0, 0]),
            (9, 10, 12),
            ["spacing [0.0011"],
        ),
        (STRAIGHT, STRAIGHT | dict(quatern_d=0.05), (9, 10, 12), ["direction"]),
    ],
)
def test_remedies_for_labels_on_another_grid(image, label, shape, words, tmp_path, refused):
    pair(tmp_path / "src", **image)
    nii(tmp_path / "src" / "labelsTr" / "a.nii.gz", np.ones(shape, np.uint8), **label)
    refused(nifti.main, [tmp_path / "src", "--out", tmp_path / "g.h5"], "labelsTr/a.nii.gz", *words)


@pytest.mark.parametrize(
    "image, label",
    [
        (QFORM, QFORM | dict(qoffset_y=-7.01)),
        (STRAIGHT, PLAIN),
        (MICRONS, dict(pixdim=[1, 1e-3, 1e-3, 1e-3, 0, 0, 0, 0])),
        (
            STRAIGHT,
            STRAIGHT
            | dict(
                sform_code=1,
                qform_code=0,
                srow_x=[0.80001, 0, 0, 0],
                srow_y=[0, 0.8, 1e-5, 0],
                srow_z=[0, 0, 2.5, 1e-4],
            ),
        ),
    ],
)
def test_grids_that_differ_by_rounding_are_one(image, label, tmp_path):
    """Far below a voxel's side, in whatever unit and by whatever affine."""
    pair(tmp_path / "src", **image)
    nii(tmp_path / "src" / "labelsTr" / "a.nii.gz", np.ones((9, 10, 12), np.uint8), **label)
    assert convert(tmp_path / "src").entries("train")[0].labeled


# -------------------------------------------------------------------------- datasets from strangers


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("nifti_header", lambda g: np.zeros(348, np.uint8), ["nifti_header", "NIfTI-1"]),
        ("nifti_header", lambda g: g.attrs["nifti_header"][:-1], ["nifti_header", "(347,)"]),
        ("nifti_header", lambda g: "text", ["nifti_header"]),
        ("nifti_header", lambda g: np.roll(g.attrs["nifti_header"], 4), ["nifti_header"]),
        ("affine", lambda g: np.eye(4), ["nifti_header", "different grids"]),
        ("affine", lambda g: np.diag([0.0, 0, 0, 1]), ["affine", "0 x 0 x 0"]),
        ("affine", None, ["nifti_header", "affine"]),
        ("source_grid", lambda g: np.array([9, 12, 10]), ["source_label of shape"]),
        (
            "source_label",
            lambda g: np.zeros((9, 10, 11), np.uint8),
            ["source_label", "(9, 10, 11)"],
        ),
        ("source_label", lambda g: np.zeros((9, 10, 12), np.int16), ["source_label", "int16"]),
        (
            "source_label",
            lambda g: np.full((9, 10, 12), 7, np.uint8),
            ["source_label", "values up to 7"],
        ),
        ("source_label", lambda g: np.zeros((9, 10, 12), np.uint8), ["source_label", "checksum"]),
    ],
)
def test_headers_and_labels_of_strangers(part, change, words, tmp_path, refused):
    pair(tmp_path / "src", **SFORM)
    path = convert(tmp_path / "src", "--spacing", "2,.5,.5").path
    with h5py.File(path, "a") as f:
        group = f["train/a"]
        new = change and change(group)
        where = group if part == "source_label" else group.attrs
        del where[part]
        if new is not None:
            where[part] = new
    refused(h5.main, [path], path, *words)


def test_an_mr_with_few_bright_voxels_is_not_blank():
    """Both percentiles are 0; the image's own range remains."""
    image = np.zeros((10, 20, 20), np.float32)
    image[5, 5, 5:9] = 500
    scaled = nifti.scale(image, None)
    assert scaled.std() == pytest.approx(1, abs=1e-3) and (scaled > 1).sum() == 4
    assert (nifti.scale(image * 0, None) == 0).all()


def test_an_image_without_the_channel_that_others_have_is_named(tmp_path, refused):
    make(make(tmp_path / "src", "ab", "_0000"), "c")
    argv = [tmp_path / "src", "--out", tmp_path / "f.h5"]
    refused(nifti.main, argv, "c.nii.gz: the cases have names of nnU-Net", "rename it")
