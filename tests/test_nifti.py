"""data/nifti.py: the layouts that users have, no volume silently misread, and masks that lie on their source again."""
import json
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import python
from medpy.metric.binary import hd95

from data import h5, nifti
from evaluate import score

OBLIQUE = dict(spacing=(1.4, 1.4, 8.0), origin=(-123.25, 41.7, 17.9))


def ball(shape, center, radius, spacing=(1, 1, 1)):
    where = np.moveaxis(np.indices(shape), 0, -1) * spacing
    return (np.linalg.norm(where - np.multiply(center, spacing), axis=-1) < radius).astype(np.uint8)


def save(path, array, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=None):
    """array (D, H, W); spacing, origin and direction as ITK has them (x, y, z)."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing), image.SetOrigin(origin), image.SetDirection(direction or np.eye(3).ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return image


def make(folder, names, suffix="", shape=(4, 10, 12), ending=".nii.gz", tr="Tr", labels=True, **place):
    """A folder of images (noise and a ball) and labels."""
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        label = ball(shape, (2, 5, 4 + i % 4), 2.6)
        save(folder / f"images{tr}" / f"{name}{suffix}{ending}", (rng.normal(100, 20, shape) + 90 * label).astype(np.float32), **place)
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
    """A case of 8 x 1.4 x 1.4 mm, rotated about two axes, with an odd origin. -> (folder, the label as ITK has it)"""
    a, b = np.radians(25), np.radians(-14)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ \
        np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    place, shape = dict(**OBLIQUE, direction=turn.ravel().tolist()), (9, 40, 44)
    label = ball(shape, (4, 18, 23), 20, (8, 1.4, 1.4)) + ball(shape, (4, 18, 23), 11, (8, 1.4, 1.4))
    save(tmp_path / "src" / "imagesTr" / "p.nii.gz", np.random.default_rng(0).normal(0, 1, shape).astype(np.float32) + label, **place)
    return tmp_path / "src", save(tmp_path / "src" / "labelsTr" / "p.nii.gz", label, **place)


# ---------------------------------------------------------------------------------------------------- layouts

def test_decathlon(tmp_path, capsys):
    src = make(tmp_path / "Task02", ["la_1", "la_2", "la_3", "la_4", "la_5"])
    make(src, ["la_9"], tr="Ts", labels=False), make(src, ["la_7"], labels=False)
    (src / "imagesTr" / "._la_1.nii.gz").write_bytes(b"Mac"), (src / "labelsTr" / "._la_1.nii.gz").write_bytes(b"Mac")
    (src / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "left atrium"}}))
    info = convert(src)
    said = capsys.readouterr().out
    assert (info.name, info.classes, info.dims, info.channels, info.standardize) == ("Task02", ["background", "left atrium"], 3, 1, True)
    assert {s: sum(e.labeled for e in es) for s, es in info.splits.items()} == {"train": 4, "val": 1, "test": 0}
    assert [e.name for e in info.entries("test")] == ["la_9"] and not info.entries("train")[-1].labeled
    assert "1 of 7 cases have no label" in said and "la_7" in said and "left atrium 0." in said
    image, label = load(info, "train", info.entries("train")[0].name)
    source = src / info.entries("train")[0].source
    assert (label == sitk.GetArrayFromImage(sitk.ReadImage(str(src / "labelsTr" / source.name)))).all() and image.dtype == np.float32
    assert info.entries("train")[0].spacing == (1, 1, 1) and info.entries("train")[0].source_grid is None


def test_train_is_in_the_order_of_the_seed_or_of_the_list(tmp_path, refused):
    src = make(tmp_path / "src", [f"c{i}" for i in range(6)])
    make(src, ["t0", "t1"], tr="Ts")
    orders = [[e.name for e in convert(src, "--seed", seed).entries("train")] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    info = convert(src, "--test", ".3")
    assert [e.name for e in info.entries("test")][2:] == ["t0", "t1"] and all(e.labeled for e in info.entries("test"))
    (src / "train.txt").write_text("c5\nc0\nc3\n"), (src / "val.txt").write_text("c1\n"), (src / "unlabeled.txt").write_text("t1\n")
    info = convert(src)
    assert {s: [e.name for e in es] for s, es in info.splits.items()} == {
        "train": ["c5", "c0", "c3"], "val": ["c1"], "test": ["t0"], "unlabeled": ["t1"]}
    (src / "labelsTr" / "c1.nii.gz").unlink()
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "val.txt", "c1", "no label")
    (src / "val.txt").write_text("nobody\n")
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "val.txt", "nobody")
    refused(nifti.main, [src, "--out", tmp_path / "g.h5", "--lists", tmp_path / "typo"], "--lists")


def test_nnunet_with_channels(tmp_path, capsys, refused):
    names = ["a_01", "a_02", "a_03"]
    src = make(tmp_path / "src", names, "_0000", ending=".nii")
    for i, name in enumerate(names):
        save(src / "imagesTr" / f"{name}_0001.nii", np.full((4, 10, 12), 0, np.float32) + np.arange(12))
    (src / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ball": 1}}))
    info = convert(src, "--val", ".34")
    assert "taking 0 (choose with --channel)" in capsys.readouterr().out
    assert info.classes == ["background", "ball"] and sorted(e.name for es in info.splits.values() for e in es) == names
    assert all(e.labeled and e.source.endswith("_0000.nii") for e in info.entries("train"))
    info = convert(src, "--channel", 1)
    assert "--channel" not in capsys.readouterr().out
    image = load(info, "train", info.entries("train")[0].name)[0]
    assert (np.diff(image[0, 0]) >= 0).all() and image[0, 0, 0] < image[0, 0, -1]
    refused(nifti.main, [src, "--out", tmp_path / "g.h5", "--channel", 2], "a_01", "no channel 2", "0, 1")


def test_decathlon_names_that_look_like_channels(tmp_path):
    src = make(tmp_path / "src", ["case_0001", "case_0002", "case_0003"])
    assert sorted(e.name for es in convert(src, "--val", ".34").splits.values() for e in es) == ["case_0001", "case_0002", "case_0003"]


def test_classes(tmp_path, refused):
    src = make(tmp_path / "src", ["a", "b"])
    save(src / "labelsTr" / "b.nii.gz", ball((4, 10, 12), (2, 5, 5), 2) * 3)
    assert convert(src).classes == ["background", "class 1", "class 2", "class 3"]
    assert convert(src, "--classes", "background,x,y,z").classes == ["background", "x", "y", "z"]
    refused(nifti.main, [src, "--out", tmp_path / "g.h5", "--classes", "background,x"], "case 'b'", "values up to 3")
    for labels, word in (({"background": 0, "x": 1, "ignore": 2}, "ignore"), ({"background": 0, "x": [1, 2], "y": 2}, "regions"),
                         ({"0": "background", "2": "x"}, "0, 2"), ({"background": 0, "x": 1, "y": 1}, "0, 1")):
        (src / "dataset.json").write_text(json.dumps({"labels": labels}))
        refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "dataset.json", word)
    (src / "dataset.json").write_text("{")
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "dataset.json", "--classes")
    assert convert(src, "--classes", "background,x,y,z").classes == ["background", "x", "y", "z"]


def test_frames_of_a_patient_stay_together(tmp_path, capsys, refused):
    src = make(tmp_path / "src", [f"patient{p}_frame{f}" for p in range(5) for f in (1, 9)])
    info = convert(src, "--patient", r"(patient\d+)_", "--val", ".4", "--dims", 2)
    assert {s: len({e.patient for e in es}) for s, es in info.splits.items()} == {"train": 3, "val": 2} and info.dims == 2
    assert all(e.patient == e.name.split("_")[0] for es in info.splits.values() for e in es) and len(info.entries("val")) == 4
    held_out, kept = info.entries("val")[0].name, info.entries("train")[0].name
    for name in (held_out, kept):
        (src / "labelsTr" / f"{name}.nii.gz").unlink()
    info, said = convert(src, "--patient", r"(patient\d+)_", "--val", ".4"), capsys.readouterr().out
    assert "1 of 10 cases are left out" in said and held_out not in {e.name for es in info.splits.values() for e in es}
    assert [e.name for e in info.entries("train") if not e.labeled] == [kept] and all(e.labeled for e in info.entries("val"))
    for regex, word in (("(patient", "not a regular expression"), ("patient", "0 groups"), (r"(patient[1-4])_", "patient0_frame1")):
        refused(nifti.main, [src, "--out", tmp_path / "g.h5", "--patient", regex], "--patient", word)
    assert not (tmp_path / "g.h5").exists()


# ---------------------------------------------------------------------------------------------------- space

def test_affine_is_that_of_itk_in_nifti_axes(oblique):
    src, label = oblique
    entry = convert(src).entries("train")[0]
    assert np.allclose(entry.spacing, (8, 1.4, 1.4)) and entry.grid == (9, 40, 44) and entry.affine.dtype == np.float64
    for voxel in ((0, 0, 0), (31, 7, 5)):
        left, posterior, superior = label.TransformIndexToPhysicalPoint(voxel)
        assert np.allclose((entry.affine @ [*voxel, 1])[:3], (-left, -posterior, superior), atol=1e-4)


@pytest.mark.parametrize("spacing", [None, "3,1.7,1.1", "8,2,2"])
def test_masks_return_to_the_source(oblique, tmp_path, spacing):
    src, source = oblique
    info = convert(src, *(("--spacing", spacing) if spacing else ()))
    entry, (image, label) = info.entries("train")[0], load(info, "train", "p")
    nifti.write_mask(tmp_path / "out" / "p.nii.gz", label, entry)
    back = sitk.ReadImage(str(tmp_path / "out" / "p.nii.gz"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p.nii.gz"]
    assert back.GetSize() == source.GetSize() and back.GetPixelID() == sitk.sitkUInt8
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(back, get)(), getattr(source, get)(), atol=1e-5), get
    a, b = sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(source)
    if spacing:
        assert np.allclose(entry.spacing, [float(s) for s in spacing.split(",")]) and entry.source_grid == (9, 40, 44)
        assert entry.grid == tuple(round(n * old / new) for n, old, new in zip((9, 40, 44), (8, 1.4, 1.4), entry.spacing))
        assert all(2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum()) > 0.9 for k in (1, 2))
    else:
        assert entry.source_grid is None and (a == b).all()


def test_resampling_invents_nothing_at_the_borders(tmp_path):
    src = make(tmp_path / "src", ["a"])
    save(src / "imagesTr" / "a.nii.gz", np.full((4, 10, 12), 200, np.float32), spacing=(2, 2, 8)), save(src / "labelsTr" / "a.nii.gz",
         np.ones((4, 10, 12), np.uint8), spacing=(2, 2, 8))
    image, label = load(convert(src, "--spacing", "1,.5,.5", "--intensity", "ct"), "train", "a")
    assert image.shape == (32, 40, 48) and np.ptp(image) < 1e-6 and (label == 1).all()
    save(src / "imagesTr" / "a.nii.gz", np.zeros((4, 10, 12), np.float32) + np.arange(12, dtype=np.float32), spacing=(2, 2, 8))
    image, _ = load(convert(src, "--spacing", "8,2,1", "--intensity", "ct", "--clip", "-100,100"), "train", "a")
    assert np.allclose(image[0, 0] * 100, np.minimum(np.arange(24) / 2, 11), atol=1e-4)  # linear between voxels


def test_hd95_in_mm_is_medpys(oblique):
    entry = (info := convert(oblique[0])).entries("train")[0]
    truth = load(info, "train", "p")[1] == 2
    mask = np.roll(truth, (1, 3, -2), (0, 1, 2))
    mask[:, :17] = False
    assert abs(score(mask, truth, entry.spacing).hd95 - hd95(mask, truth, voxelspacing=entry.spacing)) < 1e-9
    assert abs(score(mask, truth, entry.spacing).hd95 - hd95(mask, truth)) > 1


@pytest.mark.parametrize("grid, spacing", [((3, 5, 7), (4.0, 2.0, 0.5)), ((5, 7), (2.0, 0.5))])
def test_a_mask_without_affine_has_the_spacing(tmp_path, grid, spacing):
    label = np.random.default_rng(0).integers(0, 3, (3, 5, 7)[:1 if len(grid) == 2 else 3] + grid * (len(grid) == 2), np.uint8)
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


# ---------------------------------------------------------------------------------------------------- intensity

def test_ct_window_is_the_same_for_all_cases(tmp_path):
    src = make(tmp_path / "src", ["a", "b"])
    values = np.array([-1000, -175, 37.5, 250, 3000], np.float32)
    save(src / "imagesTr" / "a.nii.gz", np.resize(values, (4, 10, 12)))
    info = convert(src, "--intensity", "ct", "--val", 0)
    assert info.standardize is False
    assert np.allclose(load(info, "train", "a")[0].ravel()[:5], [-1, -1, 0, 1, 1], atol=1e-6)
    for clip in (["--clip", "-1000,1000"], ["--clip=-1000,1000"]):
        info = convert(src, "--intensity", "ct", "--val", 0, *clip)
        assert np.allclose(load(info, "train", "a")[0].ravel()[:5], [-1, -.175, .0375, .25, 1], atol=1e-6)


def test_mr_is_clipped_and_standardized(tmp_path):
    src = make(tmp_path / "src", ["a"])
    values = np.random.default_rng(0).normal(500, 30, (4, 10, 12)).astype(np.float32)
    values[0, 0, 0] = 1e6
    save(src / "imagesTr" / "a.nii.gz", values)
    info = convert(src)
    image, expected = load(info, "train", "a")[0], values.clip(*np.percentile(values, (0.5, 99.5)))
    assert info.standardize and abs(image.mean()) < 1e-4 and abs(image.std() - 1) < 1e-4 and image.max() < 4
    assert np.allclose(image, (expected - expected.mean()) / expected.std(), atol=1e-3)
    save(src / "imagesTr" / "a.nii.gz", np.full((4, 10, 12), 7, np.float32))
    assert not load(convert(src), "train", "a")[0].any()


# ---------------------------------------------------------------------------------------------------- refusals

def patch(path, at, *values, kind="f"):
    raw = bytearray(path.read_bytes())
    raw[at:at + struct.calcsize(f"<{len(values)}{kind}")] = struct.pack(f"<{len(values)}{kind}", *values)
    path.write_bytes(raw)


def joined(*arrays):
    return sitk.JoinSeries([sitk.GetImageFromArray(a) for a in arrays])


def test_four_dimensions_need_a_choice(tmp_path, refused):
    src, argv = make(tmp_path / "src", ["a"]), [tmp_path / "src", "--out", tmp_path / "g.h5"]
    first = np.random.default_rng(0).normal(0, 1, (4, 10, 12)).astype(np.float32)
    sitk.WriteImage(joined(first, -first), str(src / "imagesTr" / "a.nii.gz"))
    refused(nifti.main, argv, "a.nii.gz", "4D", "2 volumes", "--channel")
    refused(nifti.main, [*argv, "--channel", 2], "a.nii.gz", "no channel 2", "0 to 1")
    images = [load(convert(src, "--channel", c), "train", "a")[0] for c in (0, 1)]
    assert np.allclose(images[0], -images[1], atol=1e-5) and np.corrcoef(images[0].ravel(), first.ravel())[0, 1] > 0.99
    sitk.WriteImage(joined(*[(first > 1).astype(np.uint8)] * 2), str(src / "labelsTr" / "a.nii.gz"))
    refused(nifti.main, [*argv, "--channel", 1], "labelsTr/a.nii.gz", "4D")
    make(src, ["a"])
    sitk.WriteImage(sitk.GetImageFromArray(first[0]), str(src / "imagesTr" / "a.nii.gz"))
    refused(nifti.main, argv, "a.nii.gz", "2D")
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([first] * 3, -1), isVector=True), str(src / "imagesTr" / "a.nii.gz"))
    refused(nifti.main, argv, "a.nii.gz", "3 value(s) per voxel")
    make(src, ["a"], shape=(1, 10, 12))
    assert convert(src).entries("train")[0].grid == (1, 10, 12)
    refused(nifti.main, [*argv, "--channel", 1], "a.nii.gz", "no channel 1")
    assert not (tmp_path / "g.h5").exists()


@pytest.mark.parametrize("change", [
    dict(spacing=(1.0, 1.0, 1.1)), dict(origin=(0.0, 5.0, 0.0)), dict(direction=[0, 1, 0, -1, 0, 0, 0, 0, 1]), {}])
def test_label_on_another_grid(tmp_path, refused, change):
    src = make(tmp_path / "src", ["a"])
    save(src / "labelsTr" / "a.nii.gz", np.ones((4, 10, 12 if change else 11), np.uint8), **change)
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", *change, "4 x 10 x 12",
            "4 x 10 x 12" if change else "4 x 10 x 11")
    assert not (tmp_path / "g.h5").exists()


def test_labels_that_are_missing_orphaned_or_no_classes(tmp_path, refused):
    src, argv = make(tmp_path / "src", ["a", "b"]), [tmp_path / "src", "--out", tmp_path / "g.h5"]
    for values, word in ((np.full((4, 10, 12), 0.5, np.float32), "0.5"), (np.full((4, 10, 12), 256, np.int16), "256"),
                         (np.full((4, 10, 12), -1, np.int16), "-1"), (np.full((4, 10, 12), np.nan, np.float32), "NaN")):
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
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "imagesTr/a.nii", "spacing", f"{value:g}")


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
    refused(nifti.main, [src, "--out", tmp_path / "g.h5", "--intensity", "ct"], "imagesTr/a.nii", "infinite")


def test_big_endian_files_are_understood(tmp_path, refused):
    src = make(tmp_path / "src", ["a"], ending=".nii")
    path = src / "imagesTr" / "a.nii"
    old, (image, _) = path.read_bytes(), load(convert(src), "train", "a")
    big = bytearray(old)
    for start, end, width in ((0, 4, 4), (40, 56, 2), (68, 76, 2), (76, 120, 4), (252, 256, 2), (256, 328, 4), (352, len(old), 4)):
        big[start:end] = np.frombuffer(old[start:end], f"<u{width}").byteswap().tobytes()
    path.write_bytes(big)
    assert (load(convert(src), "train", "a")[0] == image).all()
    path.write_bytes(big[:-1])
    refused(nifti.main, [src, "--out", tmp_path / "g.h5"], "a.nii", "truncated, ")


@pytest.mark.parametrize("more, words", [
    (["--spacing", "1,0,1"], ["--spacing 1,0,1", "above 0"]), (["--spacing", "1,1"], ["--spacing"]),
    (["--spacing", "a,b,c"], ["--spacing"]), (["--spacing", "1,nan,1"], ["--spacing"]),
    (["--clip", "-100,100"], ["--clip", "ct"]), (["--intensity", "ct", "--clip", "9"], ["--clip"]),
    (["--intensity", "ct", "--clip", "5,-5"], ["--clip", "lower"]), (["--val", ".6", "--test", ".4"], ["--val"])])
def test_options_that_contradict(tmp_path, refused, more, words):
    refused(nifti.main, [make(tmp_path / "src", ["a"]), "--out", tmp_path / "g.h5", *more], *words)
    assert not (tmp_path / "g.h5").exists()


def test_as_a_command(tmp_path):
    src = make(tmp_path / "src", ["a", "b"], ending=".nii")
    done = python("-m", "data.nifti", src, "--out", tmp_path / "f.h5", "--val", ".5")
    assert done.returncode == 0 and "grid 4 x 10 x 12, spacing 1 x 1 x 1 mm" in done.stdout and not done.stderr
    patch(src / "imagesTr" / "a.nii", 80, 0.0)
    done = python("-m", "data.nifti", src, "--out", tmp_path / "g.h5")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "spacing" in done.stderr
    refusal = python("-m", "data.nifti", tmp_path / "nothing", "--out", tmp_path / "g.h5")
    assert refusal.returncode == 2 and "no such folder" in refusal.stderr


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
