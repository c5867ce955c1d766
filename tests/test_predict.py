"""evaluate.py --predict: masks of new images of every kind on their own grid, and g's list of them.

Also who finds the bad cases: the triage of evaluate.py --qp.
"""

import csv
import shutil
from collections import defaultdict

import cv2
import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import FakeG, make_pictures
from PIL import Image
from test_evaluate import make_run
from test_nifti import ball, ct, make, nii, same_point, save, stored_along
from torch import nn

import evaluate
from data import figures, files, h5, images, loading, metrics, new_images, nifti, pixels
from data.files import InputError
from models import checkpoints, inference
from models.device import compute
from models.quality import Corrected, Seen, together

ON = compute("cpu", "off")


class Bright(nn.Module):
    """Says that what is brighter than its case's mean is the object."""

    def forward(self, x):
        return torch.stack([-x.mean(1), x.mean(1)], 1) * 50


class Corner(nn.Module):
    """Finds the object in the first half of each axis alone: it knows how bodies lie."""

    def forward(self, x):
        near = torch.zeros_like(x)
        near[..., : x.shape[-3] // 2, : x.shape[-2] // 2, : x.shape[-1] // 2] = 1
        found = (near[:, 0] * (x[:, 0] > 0)).long()
        return nn.functional.one_hot(found, 2).movedim(-1, 1) * 50.0


def smallness(seen):
    """Answers of a g: the smaller a mask is, the better."""
    return 1 - seen.mask.flatten(2).mean(2)


class Bands(nn.Module):
    """Four classes by brightness."""

    def forward(self, x):
        return (
            nn.functional.one_hot(sum((x[:, 0] > level).long() for level in (0, 1, 2)), 4).movedim(
                -1, 1
            )
            * 50.0
        )


def uneven(seen):
    """Answers of a g that differ between slices and with the mask."""
    brightness = seen.image.flatten(1)[:, 40:60].mean(1)[:, None]
    return (brightness + 3 * seen.mask.flatten(2).mean(2)).sigmoid()


def disc(size, radius):
    mask = np.zeros(size, np.uint8)
    cv2.circle(mask, (size[1] // 2, size[0] // 2), radius, 1, -1)
    return mask


@pytest.fixture
def pictures(tmp_path):
    """Twenty pictures of discs, each on a grid of its own, the largest disc last but one.

    -> the folder, {name: mask}
    """
    folder, masks = tmp_path / "new", {}
    folder.mkdir()
    for i in range(20):
        masks[f"p{i}"] = disc((60 + i, 90 - i), 35 if i == 18 else 10 + i)
        cv2.imwrite(
            str(folder / f"p{i}.{'jpg' if i == 3 else 'png'}"),
            np.repeat(masks[f"p{i}"][..., None] * np.uint8(150) + 40, 3, 2),
        )
    return folder, masks


@pytest.fixture
def bright(monkeypatch):
    """Networks are Bright, g likes small masks; everything else of the checkpoints counts."""
    g = FakeG(smallness, classes=2)
    load_run = checkpoints.load_run
    monkeypatch.setattr(checkpoints, "load_run", lambda *args: (Bright(), load_run(*args)[1]))
    monkeypatch.setattr(checkpoints, "load_quality", lambda *_: (g, []))


def read_list(folder):
    with open(folder / "worst_first.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_the_list_is_in_the_order_of_g_and_f_together(rgb, pictures, bright, tmp_path, monkeypatch):
    """The larger the mask, the better it is by g, and the worse by both together."""

    def judged(g, net, answer, *_):
        area = answer.label.mean()
        return np.array([area]), 1 - area

    monkeypatch.setattr(evaluate, "predicted_quality", judged)
    run, out = make_run(tmp_path / "run", h5.read_info(rgb)), tmp_path / "out"
    argv = [str(pictures[0]), run, "--predict", "--qp", "qp.pt", "--pictures", "0"]
    evaluate.main([*argv, "--out", str(out)])
    rows = read_list(out)
    by_g, both = ([float(r[name]) for r in rows] for name in ("predicted Dice", metrics.TOGETHER))
    assert rows[0]["case"] == "p18"
    assert both == sorted(both) and by_g == sorted(by_g, reverse=True)


def test_a_folder_of_pictures(rgb, pictures, bright, tmp_path, capsys):
    """A mask on the grid of each picture, whose pixels are class numbers in a palette of colors.

    OUT holds these and g's list, worst first, and nothing else.
    """
    folder, masks = pictures
    run, out = make_run(tmp_path / "run", h5.read_info(rgb)), tmp_path / "out"
    evaluate.main([str(folder), run, "--predict", "--qp", "qp.pt", "--out", str(out)])
    assert {p.name for p in out.iterdir()} == {
        ".lock",
        "masks",
        "worst_first.csv",
        "worst_first.png",
    }
    assert {p.stem for p in (out / "masks").iterdir()} == set(masks)
    for name, mask in masks.items():
        with Image.open(out / "masks" / f"{name}.png") as found:
            assert (
                found.mode == "P"
                and found.getpalette()[3:6] == (255 * figures.color(0)).round().astype(int).tolist()
            )
            found = np.array(found)
        assert (
            found.shape == mask.shape
            and set(np.unique(found)) <= {0, 1}
            and metrics.dice(found > 0, mask > 0) > 0.9
        )
        assert (
            pixels.read_mask(out / "masks" / f"{name}.png", ["background", "disc"]) == found
        ).all()
    rows = read_list(out)
    assert (
        [int(r["rank"]) for r in rows] == list(range(1, 21))
        and rows[0]["case"] == "p18"
        and {r["case"] for r in rows} == set(masks)
    )
    order = [float(r["g and f together"]) for r in rows]
    assert order == sorted(order)
    for r in rows:  # g sees the mask on the network's grid
        seen = loading.resize_label(np.array(Image.open(out / r["mask"])), 32)
        assert (
            float(r["predicted Dice"])
            == pytest.approx(1 - seen.mean(), abs=1e-4)
            == float(r["predicted Dice, foreground"])
        )
    assert [r["source"] for r in rows if r["case"] == "p3"] == ["p3.jpg"]
    sheet = cv2.imread(str(out / "worst_first.png"))
    assert sheet.shape[0] > 1000 and sheet.std() > 5
    said = capsys.readouterr()
    assert (
        "wrote 20 masks" in said.out
        and said.out.index("p18") < said.out.index("next:")
        and "note" not in said.out
        and said.err == ""
    )


@pytest.mark.parametrize("gray", [False, True])
def test_pictures_are_read_like_the_data(gray, tmp_path):
    """Color by color, what data.images makes of the same files."""
    rng = np.random.default_rng(0)
    (tmp_path / "src" / "images").mkdir(parents=True)
    for name, shape, type in (
        ("rgb", (12, 16, 3), np.uint8),
        ("deep", (12, 16, 3), np.uint16),
        ("gray", (12, 16), np.uint8),
        ("float", (12, 16), np.float32),
    ):
        image, ending = (
            rng.integers(0, 256, shape).astype(type),
            "tif" if name == "float" else "png",
        )
        cv2.imwrite(str(tmp_path / "src" / "images" / f"{name}.{ending}"), image)
    images.main(
        [str(tmp_path / "src"), "--out", str(tmp_path / "a.h5"), *(["--gray"] if gray else [])]
    )
    info = h5.read_info(str(tmp_path / "a.h5"))
    found = new_images.convert(str(tmp_path / "src"), str(tmp_path / "b.h5"), info.describe())
    theirs = {
        name: image
        for split in info.splits
        for name, image, *_ in loading.whole_cases(info, split, labels=False)
    }
    ours = {
        name: image for name, image, *_ in loading.whole_cases(found, "unlabeled", labels=False)
    }
    assert set(ours) == set(theirs) == {"rgb", "deep", "gray", "float"} and all(
        (ours[name] == theirs[name]).all() for name in ours
    )


@pytest.mark.parametrize("kind, size", [("gray", 32), ("volumes", (16, 16, 32))])
def test_each_case_is_read_once(kind, size, request, monkeypatch, tmp_path):
    """By the network and by g together, which sees the slices, or patches, of load_samples()."""
    data = request.getfixturevalue(kind)
    info = h5.read_info(data)
    qp = request.getfixturevalue(f"{kind}_quality")[1]
    run = make_run(tmp_path / "run", info, size=size)
    cases = list(inference.Cases(info, "val", size))
    for case in cases:
        theirs = loading.load_samples(info, "val", size, [case.entry.name])
        ours = inference.samples_of(case, size)
        assert (ours.case, ours.at) == (theirs.case, theirs.at)
        assert torch.equal(ours.image, theirs.image) and torch.equal(ours.mean, theirs.mean)
    names = []
    read = h5.read_case

    def noted(f, info, split, name, *more, **how):
        names.append(name)
        return read(f, info, split, name, *more, **how)

    monkeypatch.setattr(h5, "read_case", noted)
    argv = [data, run, "--predict", "--qp", qp, "--split", "val", "--pictures", "0"]
    evaluate.main([*argv, "--out", str(tmp_path / "out")])
    assert names == [case.entry.name for case in cases]


def test_one_picture_and_a_folder_around_the_pictures(rgb, pictures, bright, tmp_path):
    folder, masks = pictures
    run = make_run(tmp_path / "run", h5.read_info(rgb))
    evaluate.main([str(folder / "p3.jpg"), run, "--predict", "--out", str(tmp_path / "a")])
    assert [p.name for p in (tmp_path / "a" / "masks").iterdir()] == ["p3.png"]
    (tmp_path / "around").mkdir()
    shutil.copytree(folder, tmp_path / "around" / "images")
    evaluate.main([str(tmp_path / "around"), run, "--predict", "--out", str(tmp_path / "b")])
    assert len(list((tmp_path / "b" / "masks").iterdir())) == 20


@pytest.mark.usefixtures("unrendered")
def test_pictures_that_were_resized_get_masks_on_their_source(tmp_path, pictures, bright):
    """A dataset of --size keeps what size its pictures had; their masks have it again."""
    folder, masks = pictures
    src = tmp_path / "src"
    for split in ("train", "unlabeled"):
        shutil.copytree(folder, src / split / "images")
    (src / "train" / "masks").mkdir()
    for p in (src / "train" / "images").iterdir():
        p = p.rename(p.with_name(f"t{p.name}"))
        cv2.imwrite(str(src / "train" / "masks" / f"{p.stem}.png"), masks[p.stem[1:]] * 255)
    images.main([str(src), "--out", str(tmp_path / "f.h5"), "--size", "48"])
    info = h5.read_info(str(tmp_path / "f.h5"))
    run = make_run(tmp_path / "run", info)
    evaluate.main(
        [info.path, run, "--predict", "--qp", "qp.pt", "--out", str(tmp_path / "out")]
    )  # the split unlabeled comes by itself
    assert {p.stem for p in (tmp_path / "out" / "masks").iterdir()} == set(masks)
    for name, mask in masks.items():
        found = np.array(Image.open(tmp_path / "out" / "masks" / f"{name}.png"))
        assert found.shape == mask.shape and metrics.dice(found > 0, mask > 0) > 0.85
    assert read_list(tmp_path / "out")[0]["case"] == "p18"


@pytest.mark.parametrize(
    "options, suffix",
    [
        (["--spacing", "8,1.2,1.2", "--intensity", "ct", "--clip", "50,200"], ""),
        (["--dims", "2"], ""),
        (["--channel", "1"], "_0001"),
    ],
)
def test_a_folder_of_volumes_is_prepared_like_the_data(options, suffix, bright, tmp_path, capsys):
    """imagesTs give the same masks through their dataset as through their folder.

    Spacing, window and channel are those of the data, also without data.nifti.
    """
    src = make(
        tmp_path / "src",
        ["a", "b", "c"],
        shape=(9, 40, 44),
        spacing=(1.4, 1.4, 8.0),
        origin=(3.0, -5.0, 7.0),
        suffix=suffix,
    )
    make(
        src,
        ["x", "y"],
        shape=(9, 36, 44),
        spacing=(1.3, 1.4, 7.0),
        origin=(1.0, 2.0, 3.0),
        tr="Ts",
        labels=False,
        suffix=suffix,
    )
    if suffix:  # two channels, of which the first one is flat
        for folder in ("imagesTr", "imagesTs"):
            for p in list((src / folder).iterdir()):
                other = sitk.ReadImage(str(p)) * 0.0
                sitk.WriteImage(other, str(p).replace(suffix, "_0000"))
    nifti.main([str(src), "--out", str(tmp_path / "f.h5"), *options])
    info = h5.read_info(str(tmp_path / "f.h5"))
    run = make_run(tmp_path / "run", info, size=32 if info.dims == 2 else (16, 32, 32))
    evaluate.main(
        [info.path, run, "--predict", "--split", "test", "--out", str(tmp_path / "through_h5")]
    )
    evaluate.main(
        [str(src / "imagesTs"), run, "--predict", "--out", str(tmp_path / "through_folder")]
    )
    found = {
        p.name: sitk.ReadImage(str(p)) for p in (tmp_path / "through_folder" / "masks").iterdir()
    }
    assert (
        set(found) == {"x.nii.gz", "y.nii.gz"}
        and "note: the checkpoint" not in capsys.readouterr().out
    )
    for name, mask in found.items():
        other, source = (
            sitk.ReadImage(str(p))
            for p in (
                tmp_path / "through_h5" / "masks" / name,
                src / "imagesTs" / name.replace(".nii", f"{suffix}.nii"),
            )
        )
        assert (
            sitk.GetArrayFromImage(mask) == sitk.GetArrayFromImage(other)
        ).all() and 0 < sitk.GetArrayFromImage(mask).mean() < 1
        for what in ("Size", "Spacing", "Origin", "Direction"):
            assert np.allclose(
                getattr(mask, f"Get{what}")(), getattr(source, f"Get{what}")(), atol=1e-5
            ), what


def test_new_volumes_are_turned_to_the_network_and_masks_back(tmp_path, capsys, monkeypatch):
    """A network that knows where the organ lies finds it in a volume of any axes, in its place."""
    label = np.zeros((16, 18, 20), np.uint8)
    label[2:7, 3:8, 4:9], new = 1, tmp_path / "new"
    image = np.where(label, 300, -50).astype(np.float32)
    image[9:14, 10:16, 11:16] = 300  # what it takes for the organ, unless it knows the axes
    for name in "abc":
        for part, values in (("images", image), ("labels", label)):
            stored_along(tmp_path / "src" / f"{part}Tr" / f"{name}.nii", "SAR", values)
    nifti.main([str(tmp_path / "src"), "--out", str(tmp_path / "f.h5")])
    info = h5.read_info(str(tmp_path / "f.h5"))
    run, load_run = make_run(tmp_path / "run", info, size=(16, 16, 16)), checkpoints.load_run
    monkeypatch.setattr(checkpoints, "load_run", lambda *args: (Corner(), load_run(*args)[1]))
    axes = {"same": "SAR", "flipped": "IPR", "swapped": "RSA", "both": "PIL"}
    for name, letters in axes.items():
        stored_along(new / f"{name}.nii.gz", letters, image)
    nii(new / "lost.nii.gz", image)
    argv = [str(new), run, "--predict", "--out", str(tmp_path / "out"), "--window", "whole"]
    evaluate.main(argv)
    said = capsys.readouterr().out
    assert "3 of 5 volumes lie along other body axes than SAR" in said
    assert "1 of 5 volumes have no orientation" in said and "(the first: lost)" in said
    for name in axes:
        mask = tmp_path / "out" / "masks" / f"{name}.nii.gz"
        stored_along(tmp_path / "truth.nii.gz", axes[name], label)
        assert same_point(mask, new / mask.name, (1, 2, 3))
        paths = mask, tmp_path / "truth.nii.gz"
        found, truth = (np.asarray(nibabel.load(p).dataobj) for p in paths)
        assert found.shape == truth.shape and (found == truth).all(), name


def test_new_ct_volumes_that_are_not_in_hounsfield_units(bright, tmp_path, capsys):
    for folder, values in (("src/imagesTr", ct()), ("src/labelsTr", ct() > 0), ("new", ct(1000))):
        for name in "abc":
            nii(tmp_path / folder / f"{name}.nii", values.astype(np.int16), qform_code=1)
    nifti.main([str(tmp_path / "src"), "--out", str(tmp_path / "f.h5"), "--intensity", "ct"])
    run = make_run(tmp_path / "run", h5.read_info(str(tmp_path / "f.h5")), size=(16, 16, 16))
    capsys.readouterr()
    for folder, noted in (("new", True), ("src/imagesTr", False)):
        argv = [str(tmp_path / folder), run, "--predict", "--out", str(tmp_path / "out")]
        evaluate.main([*argv, "--overwrite"])
        assert ("3 of 3 volumes do not look like Hounsfield" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("kind, size", [("gray", 32), ("volumes", (16, 16, 32))])
def test_a_case_is_judged_like_the_volumes_of_the_triage(kind, size, request):
    """The list has what the comparison of estimates says of a volume, for the same masks."""
    info = h5.read_info(request.getfixturevalue(kind))
    g, net = FakeG(uneven, classes=4), Bands()
    name = info.entries("val")[0].name
    samples = loading.load_samples(info, "val", size, [name])
    outputs = evaluate.compare_estimates(g, evaluate.Opinions(net, net), samples, ON, 8)
    by_g, both = (
        metrics.at_level(outputs, "volume", samples.case, name)[0]
        for name in ("g", "g and f together")
    )
    if info.dims == 3:  # a mask that agrees with itself where patches overlap
        label = (
            np.random.default_rng(0).integers(0, 4, info.entries("val")[0].grid).astype(np.uint8)
        )
        parts = torch.stack(
            [
                torch.from_numpy(label[tuple(slice(c, c + s) for c, s in zip(at, size))].copy())
                for at in samples.at
            ]
        ).long()
        mask = nn.functional.one_hot(parts, 4).movedim(-1, 1)[:, 1:].float()
        with torch.no_grad():
            image, _ = samples.batch(torch.arange(len(samples)))
            says = g(Seen(image, mask))
            p = inference.class_probabilities(net, image, ON)
        area = mask.flatten(2).sum(2)
        by_g, both = (
            ((v * area).sum(0) / area.sum(0)).numpy() for v in (says, together(says, mask, p))
        )
    else:
        with torch.no_grad():
            label = (
                torch.cat(
                    [
                        inference.class_probabilities(
                            net, samples.batch(torch.tensor([i]))[0], ON
                        ).argmax(1)
                        for i in range(len(samples))
                    ]
                )
                .numpy()
                .astype(np.uint8)
            )
    case = inference.ReadCase(info.entries("val")[0], samples, None)
    answer = inference.Answer(case, label)
    found = evaluate.predicted_quality(g, net, answer, size, ON)
    assert found[0] == pytest.approx(by_g, abs=1e-4)
    assert found[1] == pytest.approx(both.mean(), abs=1e-4)


def test_masks_of_several_classes_come_back(tmp_path):
    """A PNG with a colored palette gives its class numbers to data.images.

    One of grays gives its grays.
    """
    label = np.random.default_rng(0).integers(0, 4, (20, 30)).astype(np.uint8)
    pixels.write_mask(tmp_path / "m.png", label)
    classes = ["background", "a", "b", "c"]
    assert (pixels.read_mask(tmp_path / "m.png", classes) == label).all()
    gray = Image.fromarray(3 - label)
    gray.putpalette([v for k in range(3, -1, -1) for v in (k, k, k)])
    gray.save(tmp_path / "gray.png")
    assert (pixels.read_mask(tmp_path / "gray.png", classes) == label).all()
    with pytest.raises(InputError, match=r"m.png: indices 0 .*, 1 .*, 2 .*, 3 .*--classes"):
        pixels.read_mask(tmp_path / "m.png", ["background", "foreground"])


def test_a_checkpoint_knows_how_its_data_were_prepared(rgb, tmp_path):
    src = make(tmp_path / "src", ["a", "b", "c"])
    nifti.main(
        [
            str(src),
            "--out",
            str(tmp_path / "f.h5"),
            "--spacing",
            "2,1,1",
            "--intensity",
            "ct",
            "--clip",
            "0,200",
        ]
    )
    assert h5.read_info(str(tmp_path / "f.h5")).describe()["prepared"] == {
        "from": "nifti",
        "spacing": [2, 1, 1],
        "window": [0, 200],
        "channel": None,
        "nnunet": False,
        "axes": "SPL",
    }
    assert h5.read_info(rgb).describe()["prepared"] == {"from": "pictures"}


def test_a_checkpoint_that_does_not_know_takes_images_as_they_are(gray, tmp_path, capsys, refused):
    """A phantom's network takes volumes, and a note says so.

    It does not where the data had a window of intensities.
    """
    info = h5.read_info(gray)
    run = make_run(tmp_path / "run", info)
    make(tmp_path / "src", ["a"], shape=(3, 40, 44), spacing=(0.5, 0.5, 2.0))
    new = str(tmp_path / "src" / "imagesTr")
    evaluate.main([new, run, "--predict", "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "note: the checkpoint does not say how its data were prepared" in told
    assert f"voxels of 1.5 x 1.5 mm for {run}, but voxels of 0.5 x 0.5 mm for {new}; " in told
    assert (tmp_path / "out" / "masks" / "a.nii.gz").exists()
    info.standardize = False
    refused(
        evaluate.main,
        [
            tmp_path / "src" / "imagesTr",
            make_run(tmp_path / "ct", info),
            "--predict",
            "--out",
            tmp_path / "o",
        ],
        "window",
    )


def test_masks_do_not_go_among_the_images(rgb, pictures, tmp_path, refused):
    """The next run would take its pictures for images."""
    folder, _ = pictures
    run = make_run(tmp_path / "run", h5.read_info(rgb))
    among = ((folder, f"{folder}/a/.."), (folder, folder / "images"), (folder / "p3.jpg", folder))
    for source, out in among:
        argv = [source, run, "--predict", "--overwrite", "--out", out]
        refused(evaluate.main, argv, f"--out {out}", "is a folder of the images")


def test_masks_of_a_dataset_do_not_go_beside_its_images(rgb, tmp_path, refused):
    """MINE/masks may hold the truth that the dataset was made from."""
    mine = make_pictures(tmp_path / "mine", 2)
    run = make_run(tmp_path / "run", h5.read_info(rgb))
    argv = [rgb, run, "--predict", "--overwrite", "--out"]
    refused(evaluate.main, [*argv, mine], "is a folder of the images")
    prepared = {"from": "pictures", "folders": ["red", "green", "blue"]}
    state = torch.load(run, weights_only=True)
    state["data"] |= dict(prepared=prepared, channel_names=prepared["folders"])
    torch.save(state, run)
    (tmp_path / "channels" / "green").mkdir(parents=True)
    refused(evaluate.main, [*argv, tmp_path / "channels"], "is a folder of the images")
    other = tmp_path / "other" / "masks"
    other.mkdir(parents=True)
    for name in ("notes.txt", "a.h5"):
        (other / name).write_text("mine")
        refused(evaluate.main, [*argv, other.parent], f"{name}: no mask, but among the masks")
        (other / name).unlink()


@pytest.fixture
def rgb_run(rgb, tmp_path):
    """A checkpoint of a network for pictures in color."""
    return make_run(tmp_path / "run", h5.read_info(rgb))


@pytest.fixture
def scans(tmp_path):
    """A folder of NIfTI volumes: a.nii.gz alone."""
    return make(tmp_path / "scans", ["a"]) / "imagesTr"


def assert_nothing_left(out):
    """Neither masks nor what was read before."""
    assert {path.name for path in (*out.glob("*"), *out.glob(".*"))} <= {".lock"}


@pytest.fixture
def refused_to_predict(tmp_path, refused):
    """refused_to_predict(new, run, *words): new images are refused, and nothing is left behind."""

    def check(new, run, *words):
        refused(evaluate.main, [new, run, "--predict", "--out", tmp_path / "o"], *words)
        assert_nothing_left(tmp_path / "o")

    return check


def test_scans_are_refused_by_a_network_for_pictures(rgb_run, scans, refused_to_predict):
    refused_to_predict(scans, rgb_run, "NIfTI", "pictures")


def test_scans_are_refused_by_a_network_for_gray_pictures(scans, tmp_path, refused_to_predict):
    """Although it has one channel, as they have."""
    source, path = make_pictures(tmp_path / "g", 4), str(tmp_path / "g.h5")
    images.main([str(source), "--out", path, "--gray", "--val", "0.3"])
    run = make_run(tmp_path / "gray", h5.read_info(path))
    refused_to_predict(scans, run, "NIfTI", "learned from pictures")


def test_pictures_are_refused_by_a_network_for_volumes(
    volumes, pictures, tmp_path, refused_to_predict
):
    run = make_run(tmp_path / "run3d", h5.read_info(volumes), size=(16, 16, 32))
    refused_to_predict(pictures[0], run, "holds pictures", "learned from NIfTI volumes")


def test_images_that_are_not_there(rgb_run, tmp_path, refused_to_predict):
    (tmp_path / "empty").mkdir()
    refused_to_predict(tmp_path / "empty", rgb_run, "empty", "no picture")
    refused_to_predict(tmp_path / "nowhere", rgb_run, "no such file")
    refused_to_predict("", rgb_run, "data: is empty")


def test_new_images_have_no_scores_and_no_split(rgb_run, pictures, tmp_path, refused):
    folder, _ = pictures
    argv = [folder, rgb_run, "--out", tmp_path / "o"]
    refused(evaluate.main, argv, "a folder")
    refused(evaluate.main, [*argv, "--predict", "--split", "val"], "--split", str(folder))
    assert_nothing_left(tmp_path / "o")


@pytest.mark.parametrize("name", ["a.dcm", "a.gif", "a.mha", "a.nrrd"])
def test_a_format_that_is_not_read_names_those_that_are(
    name, rgb_run, tmp_path, refused_to_predict
):
    (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM")
    refused_to_predict(tmp_path / name, rgb_run, name, "save it as .bmp, ", ".nii.gz")


def test_pictures_and_scans_in_one_folder(rgb_run, pictures, scans, refused_to_predict):
    folder, _ = pictures
    shutil.copy(scans / "a.nii.gz", folder)
    refused_to_predict(folder, rgb_run, "both")


def test_two_pictures_of_one_name(rgb_run, pictures, refused_to_predict):
    folder, _ = pictures
    (folder / "p4.bmp").write_bytes((folder / "p4.png").read_bytes())
    refused_to_predict(folder, rgb_run, "p4", "is there too")


def test_a_picture_that_was_cut_short(rgb_run, pictures, refused_to_predict):
    folder, _ = pictures
    (folder / "p5.png").write_bytes((folder / "p5.png").read_bytes()[:60])
    refused_to_predict(folder, rgb_run, "p5.png", "not a readable picture")


def test_a_picture_too_small_for_a_network(rgb_run, pictures, refused_to_predict):
    """The message names neither the temporary file nor what nobody did."""
    folder, _ = pictures
    cv2.imwrite(str(folder / "p5.png"), np.zeros((3, 60, 3), np.uint8))
    refused_to_predict(folder, rgb_run, f"{folder}: case 'p5': a grid of 3 x 60", "pad it\n")


NONSENSE = (
    {"from": "nifti", "spacing": [1, 2]},
    {"from": "nifti", "spacing": "1,2,3"},
    {"from": "nifti", "eval": 1},
    {"from": "nifti", "spacing": [0, 1, 1]},
    {"from": "nifti", "spacing": [1e-6] * 3},
    {"from": "nifti", "spacing": [float("inf")] * 3},
    {"from": "nifti", "window": [1, 1]},
    {"from": "nifti", "window": [float("nan"), 1]},
    {"from": "nifti", "channel": True},
    {"from": "nifti", "nnunet": 1},
    {"from": ["nifti"]},
    [1],
    "nifti",
    {"from": "nifti", "axes": "SAS"},
    {"from": "nifti", "axes": 3},
)


def test_a_checkpoint_that_says_nonsense_of_its_data(volumes, scans, tmp_path, refused_to_predict):
    run = make_run(tmp_path / "run3d", h5.read_info(volumes), size=(16, 16, 32))
    state = torch.load(run, weights_only=True)
    for wrong in NONSENSE:
        state["data"]["prepared"] = wrong
        torch.save(state, run)
        refused_to_predict(scans, run, "cannot be understood")


@pytest.mark.parametrize("wrong", ["[1]", "{"])
def test_a_dataset_that_says_nonsense_of_itself(wrong, rgb, rgb_run, tmp_path, refused_to_predict):
    shutil.copy(rgb, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        f.attrs["prepared"] = wrong
    refused_to_predict(tmp_path / "f.h5", rgb_run, "f.h5")


def test_masks_stay_if_new_ones_fail(rgb, pictures, tmp_path, refused, monkeypatch):
    folder, _ = pictures
    run, out = make_run(tmp_path / "run", h5.read_info(rgb)), tmp_path / "out"
    argv = [folder, run, "--predict", "--overwrite", "--out", out]
    evaluate.main(list(map(str, argv)))
    before = {path.name: path.stat().st_mtime_ns for path in (out / "masks").iterdir()}
    write, written = evaluate.write_mask, []

    def fails(masks, label, entry):
        if written:
            raise files.DiskFull("no room")
        written.append(write(masks, label, entry))
        return written[0]

    monkeypatch.setattr(evaluate, "write_mask", fails)
    with pytest.raises(files.DiskFull):
        evaluate.main(list(map(str, argv)))
    assert {path.name: path.stat().st_mtime_ns for path in (out / "masks").iterdir()} == before
    assert {path.name for path in out.iterdir()} <= {"masks", ".lock"}


def test_a_disk_that_is_full_is_told_as_such(pictures, tmp_path, monkeypatch):
    """At an ordinary exit, HDF5 would crash: see cli()."""

    def fails(*args, **more):
        raise files.DiskFull("no room")

    monkeypatch.setattr(h5, "write", fails)
    data = dict(dims=2, channels=3, classes=["background", "one"], prepared={"from": "pictures"})
    with pytest.raises(files.DiskFull):
        new_images.convert(str(pictures[0]), str(tmp_path / "o.h5"), data)


@pytest.mark.usefixtures("unrendered")
def test_masks_are_not_replaced_unasked(rgb, pictures, bright, tmp_path, refused):
    """They may have been corrected.

    With --overwrite nothing of the former run stays; nor, ever, what a killed process had read.
    """
    folder, _ = pictures
    run, out = make_run(tmp_path / "run", h5.read_info(rgb)), tmp_path / "out"
    evaluate.main([str(folder), run, "--predict", "--qp", "qp.pt", "--out", str(out)])
    refused(
        evaluate.main, [folder / "p3.jpg", run, "--predict", "--out", out], "masks", "--overwrite"
    )
    (out / ".images.123.part").touch()
    (out / ".masks.123.part").mkdir()
    (out / ".masks.123.part" / "p1.png").touch()
    evaluate.main([str(folder / "p3.jpg"), run, "--predict", "--out", str(out), "--overwrite"])
    assert [p.name for p in (out / "masks").iterdir()] == ["p3.png"] and {
        p.name for p in out.iterdir()
    } <= {"masks", ".lock"}
    evaluate.main(
        [
            str(folder / "p3.jpg"),
            run,
            "--predict",
            "--qp",
            "qp.pt",
            "--pictures",
            "0",
            "--out",
            str(out),
            "--overwrite",
        ]
    )
    assert {p.name for p in out.iterdir()} <= {"masks", ".lock", "worst_first.csv"} and len(
        read_list(out)
    ) == 1


def test_a_wrong_g_is_refused_before_images_are_read(
    rgb, gray_quality, pictures, tmp_path, refused, monkeypatch
):
    monkeypatch.setattr(pixels, "read_picture", None)
    refused(
        evaluate.main,
        [
            pictures[0],
            make_run(tmp_path / "run", h5.read_info(rgb)),
            "--predict",
            "--qp",
            gray_quality[1],
            "--out",
            tmp_path / "o",
        ],
        "qp.pt",
        "classes",
    )


def turned(path, array, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(array).save(path, exif=exif, quality=95)


def test_pictures_that_are_stored_turned(rgb, bright, tmp_path, refused, capsys):
    """A camera's EXIF orientation turns nothing.

    The mask lies on the grid that is stored, and a note says so. With a mask beside it such a
    picture is refused.
    """
    folder, mask = tmp_path / "new", np.zeros((60, 90), np.uint8)
    folder.mkdir()
    mask[10:40, 5:30] = 1
    for orientation in (1, 3, 6):
        turned(
            folder / f"p{orientation}.jpg",
            np.repeat(mask[..., None] * np.uint8(150) + 40, 3, 2),
            orientation,
        )
    evaluate.main(
        [
            str(folder),
            make_run(tmp_path / "run", h5.read_info(rgb)),
            "--predict",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert "note: 2 files" in (said := capsys.readouterr().out) and "p3.jpg: stored turned" in said
    for p in (tmp_path / "out" / "masks").iterdir():
        assert metrics.dice(np.array(Image.open(p)) > 0, mask > 0) > 0.9
    (tmp_path / "src").mkdir()
    folder.rename(tmp_path / "src" / "images"), (tmp_path / "src" / "masks").mkdir()
    for orientation in (1, 3, 6):
        cv2.imwrite(str(tmp_path / "src" / "masks" / f"p{orientation}.png"), mask * 255)
    refused(images.main, [tmp_path / "src", "--out", tmp_path / "f.h5"], ".jpg", "EXIF")


def test_hidden_files_and_names_that_differ_in_capitals(tmp_path, refused):
    for name in (".hidden.png", "._a.png", "a.png", "10.png", "9.png", "\u00b2.png"):  # a small 2
        cv2.imwrite(str(tmp_path / name), np.zeros((9, 9, 3), np.uint8))
    assert list(images.pictures(tmp_path)) == ["9", "10", "a", "\u00b2"]
    cv2.imwrite(str(tmp_path / "A.png"), np.zeros((9, 9, 3), np.uint8))
    refused(lambda argv: images.pictures(tmp_path), [], "a.png", "A.png", "is there too")


def test_a_case_without_the_channel_is_refused(tmp_path, refused):
    src = make(tmp_path / "src", ["a", "b", "c"], suffix="_0001")
    make(src, ["a", "b", "c"], suffix="_0000", labels=False)
    nifti.main([str(src), "--out", str(tmp_path / "f.h5"), "--channel", "1"])
    run = make_run(tmp_path / "run", h5.read_info(str(tmp_path / "f.h5")), size=(16, 16, 16))
    save(tmp_path / "new" / "x_0000.nii.gz", ball((4, 10, 12), (2, 5, 5), 3).astype(np.float32))
    refused(
        evaluate.main,
        [tmp_path / "new", run, "--predict", "--out", tmp_path / "o"],
        "'x' has no channel 1",
    )


def test_channels_that_are_taken_for_cases_are_noted(tmp_path, capsys):
    src = make(tmp_path / "src", ["a", "b", "c"])
    nifti.main([str(src), "--out", str(tmp_path / "f.h5")])
    data = h5.read_info(str(tmp_path / "f.h5")).describe()
    for names, noted in ((("x_0000", "y_0000"), False), (("x_0000", "x_0001"), True)):
        new = tmp_path / names[1]
        for name in names:
            save(new / f"{name}.nii.gz", ball((4, 10, 12), (2, 5, 5), 3).astype(np.float32))
        capsys.readouterr()
        new_images.convert(str(new), str(tmp_path / "n.h5"), data)
        assert ("note: x_0000 and so on are taken for cases" in capsys.readouterr().out) == noted


# ------------------------------------------------------------------------------------------- triage


def outputs_of(dice, **estimates):
    """Outputs of cases that are one slice of one class, of a hundred pixels in all."""
    dice = np.array(dice)[:, None]
    return metrics.Outputs(
        dice > 0,
        50 * dice,
        np.full(dice.shape, 50),
        np.full(dice.shape, 100),
        {k: np.array(v)[:, None] for k, v in estimates.items()},
    )


def test_triage_by_hand():
    """Ten cases, three of them bad: two are shown.

    A perfect ranking finds two of three, its opposite none, and one that knows nothing 20%.
    """
    true, case = (
        np.array([0.1, 0.3, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]),
        [f"c{i}" for i in range(10)],
    )
    rows, curves = metrics.triage(
        [
            outputs_of(
                true, g=true, wrong=-true, flat=0 * true, half=[0.5, 0, 1, 0, 1, 1, 1, 1, 1, 1]
            )
        ],
        case,
    )
    found = {r["estimate"]: r["found"] for r in rows}
    assert found == pytest.approx(
        {"g": 2 / 3, "wrong": 0, "flat": 0.2, "half": 1 / 3, "at best": 2 / 3}
    )
    assert rows[0]["bad"] == 3 and rows[0]["cases"] == 10 and rows[0]["runs"] == "1 of 1"
    assert (
        curves["g"][0] == 0
        and curves["g"][10] == pytest.approx(1 / 3)
        and curves["g"][15] == pytest.approx(0.5)
        and curves["g"][30] == curves["g"][100] == 1
    )
    assert curves["wrong"][70] == pytest.approx(0) and np.allclose(
        curves["flat"], np.linspace(0, 1, 101)
    )  # at random, whatever the number
    assert {r["estimate"]: r["area under curve"] for r in rows}["flat"] == pytest.approx(0.5)
    assert {r["estimate"]: r["area under curve"] for r in rows}["at best"] == pytest.approx(
        1 - 0.3 / 2
    )


def test_triage_is_that_of_runs_with_bad_and_good_cases():
    true, case = np.array([0.1, 0.9, 0.9, 0.9, 0.9]), list("abcde")
    good, bad = outputs_of(true + 0.7, g=true), outputs_of(true * 0.1, g=true)
    rows, _ = metrics.triage([good, outputs_of(true, g=true), bad, outputs_of(true, g=-true)], case)
    assert rows[0] == {
        "estimate": "g",
        "found": 0.5,
        "area under curve": pytest.approx(rows[0]["area under curve"]),
        "runs": "2 of 4",
        "cases": 5,
        "bad": 1.0,
    }
    assert metrics.triage([good, bad], case) == ([], {})


def test_triage_takes_the_mean_over_classes_of_whole_volumes():
    """Two volumes of two slices.

    Class 0 is good, class 1 as bad as one volume's Dice of .5 needs to be below .7 on average.
    """
    shared, total = (
        np.array([[10, 1], [10, 1], [10, 10], [10, 9]]),
        np.array([[20, 10], [20, 10], [20, 20], [20, 20]]),
    )
    o = metrics.Outputs(
        shared > 0, shared, total / 2, total, {"g": np.array([[1, 0.1], [1, 0.1], [1, 1], [1, 1]])}
    )
    rows, _ = metrics.triage([o], ["v", "v", "w", "w"])
    assert (
        rows[0]["bad"] == 1 and rows[0]["cases"] == 2 and rows[0]["found"] == pytest.approx(0.4)
    )  # (1 + .2) / 2 = .6; 20% of two cases


def test_files_that_pass_for_channels_and_axes_that_nobody_knows_are_noted(tmp_path, capsys):
    paths = {f"case_{i:04d}": tmp_path / f"case_{i:04d}.nii" for i in range(3)}
    for path in paths.values():
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((8, 9, 10), np.float32)), str(path))
    for axes, noted in (("SPL", False), (None, True)):
        how = nifti.Preparation(nnunet=True, axes=axes)
        found = list(new_images.volumes(paths, how, defaultdict(list)))
        said = capsys.readouterr().out
        assert [case.name for case in found] == ["case"]
        assert "2 of 3 files are of other channels" in said
        assert ("does not know along which body axes" in said) == noted


@pytest.mark.parametrize("kind, says", [("gray", "volume Dice"), ("rgb", "Dice")])
def test_the_dice_of_a_volume_is_named_beside_its_slice(kind, says, request):
    info = h5.read_info(request.getfixturevalue(kind))
    entry = info.entries("val")[0]
    drawing = evaluate.pack(np.zeros(entry.grid[-2:], np.uint8))
    row = evaluate.Predicted(np.array([0.2, 0.4]), 0.3, entry, "a.png", 0, drawing)
    (panel,) = evaluate.worst_panels(info, "val", [row])
    assert panel.title.endswith(f"\npredicted {says} 0.30")


def test_masks_do_not_go_where_the_truth_may_be(rgb, tmp_path, refused):
    """MINE/images as the source means that MINE/masks may hold the truth."""
    src = make_pictures(tmp_path / "mine", 2)
    run = make_run(tmp_path / "run", h5.read_info(rgb))
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "images").symlink_to(src / "images")
    argv = [linked / "images", run, "--predict", "--overwrite", "--out", linked]
    refused(evaluate.main, argv, "is a folder of the images")
    for new in (src / "images", sorted((src / "images").iterdir())[0], src):
        argv = [new, run, "--predict", "--overwrite", "--out", src]
        refused(evaluate.main, argv, "is a folder of the images")


@pytest.mark.usefixtures("unrendered")
def test_a_folder_among_the_masks_stops_it_before_anything_is_removed(
    rgb, pictures, tmp_path, refused
):
    run, out = make_run(tmp_path / "run", h5.read_info(rgb)), tmp_path / "out"
    argv = [str(pictures[0] / "p3.jpg"), run, "--predict", "--out", str(out)]
    (out / "masks").mkdir(parents=True)
    (out / "masks" / ".DS_Store").touch()
    evaluate.main(argv)
    (out / "masks" / "corrected").mkdir()
    refused(evaluate.main, [*argv, "--overwrite"], "masks/corrected: a folder among the masks")
    assert (out / "masks" / "p3.png").is_file()


@pytest.mark.usefixtures("unrendered")
def test_the_list_asks_the_network_that_made_the_masks(rgb, rgb_quality, tmp_path, monkeypatch):
    """With --trust f as g corrects it, as where estimates of quality are compared."""
    asked = []
    monkeypatch.setattr(
        evaluate, "predicted_quality", lambda g, net, *_: asked.append(net) or (np.zeros(1), 0.0)
    )
    argv = [rgb, make_run(tmp_path / "run", h5.read_info(rgb)), "--qp", rgb_quality[1]]
    for trust in ("0", "1"):
        out = str(tmp_path / trust)
        evaluate.main([*argv, "--predict", "--split", "val", "--trust", trust, "--out", out])
    assert {type(net) is Corrected for net in asked[: len(asked) // 2]} == {False}
    assert {type(net) is Corrected for net in asked[len(asked) // 2 :]} == {True}
