"""Cases of several channels: what converters make of them, and evaluate.py --predict of new ones.

What is refused of them is in bad_sources.py.
"""

import json
import zlib

import cv2
import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from bad_sources import write_tiff
from test_evaluate import make_run
from test_nifti import ball, convert, joined, load, make, save
from test_predict import Bright

import evaluate
from data import h5, images, loading, new_images, nifti, pixels, prepared, ssl4mis
from data.files import InputError
from models import checkpoints

NAMES = {"0": "T2", "1": "ADC", "2": "CT"}
PLACE = dict(shape=(9, 36, 40), spacing=(1.4, 1.4, 8.0), origin=(3.0, -5.0, 7.0))


def mpmri(folder, names="abc", channels=3, tr="Tr", labels=True, table=None):
    """Cases of nnU-Net's layout, whose channels differ in contrast; the last one is like CT."""
    for c in range(channels):
        make(folder, names, f"_{c:04d}", tr=tr, labels=labels, **PLACE)
        for i, name in enumerate(names):
            path = folder / f"images{tr}" / f"{name}_{c:04d}.nii.gz"
            image = sitk.ReadImage(str(path))
            noise = np.random.default_rng(10 * i + c).normal(0, 5, PLACE["shape"])
            values = sitk.GetArrayFromImage(image) * (1, -2, 4)[c] - 300 * (c == 2) + noise
            new = sitk.GetImageFromArray(values.astype(np.float32))
            new.CopyInformation(image)
            sitk.WriteImage(new, str(path))
    said = {"channel_names": NAMES, "labels": {"background": 0, "ball": 1}}
    (folder / "dataset.json").write_text(json.dumps(said if table is None else table))
    return folder


def in_4d(src, names="abc", tr="Tr"):
    """The same cases as 4D files."""
    for name in names:
        paths = sorted((src / f"images{tr}").glob(f"{name}_*"))
        sitk.WriteImage(
            sitk.JoinSeries([sitk.ReadImage(str(p)) for p in paths]),
            str(src / f"images{tr}" / f"{name}.nii.gz"),
        )
        for path in paths:
            path.unlink()
    return src


def everything(info):
    """{case: image} of a file."""
    return {e.name: load(info, s, e.name)[0] for s, es in info.splits.items() for e in es}


# ------------------------------------------------------------------------------------ NIfTI


@pytest.mark.parametrize("options", [[], ["--spacing", "4,2,2"], ["--axes", "IAR", "--dims", "2"]])
def test_each_channel_is_what_it_is_alone(options, tmp_path, capsys):
    """In the order of their numbers or of --channel, with the names of dataset.json."""
    src = mpmri(tmp_path / "src")
    options = ["--intensity", "mr", *options]
    alone = [everything(convert(src, *options, "--channel", c)) for c in range(3)]
    info = convert(src, *options)
    said = capsys.readouterr().out
    assert "channels 0 (T2), 1 (ADC), 2 (CT); taking all (choose with --channel)" in said
    assert (info.channels, info.channel_names, info.color) == (3, ["T2", "ADC", "CT"], False)
    assert info.standardize is True and info.prepared["names"] == info.channel_names
    assert info.prepared["channel"] is None and info.prepared["window"] is None
    whole = everything(info)
    for name, image in whole.items():
        assert image.shape[-1] == 3
        assert all((image[..., c] == alone[c][name]).all() for c in range(3))
    some = convert(src, *options, "--channel", "2,0")
    assert some.channel_names == ["CT", "T2"] and some.prepared["channel"] == [2, 0]
    for name, image in everything(some).items():
        assert (image[..., 0] == alone[2][name]).all() and (image[..., 1] == alone[0][name]).all()
    for entry in info.entries("train"):
        assert entry.source == f"imagesTr/{entry.name}_0000.nii.gz" and entry.labeled
    stacked = convert(in_4d(src), *options)
    assert stacked.channel_names == info.channel_names and not stacked.prepared["nnunet"]
    found = everything(stacked)
    assert all((found[name] == image).all() for name, image in whole.items())


def test_one_channel_is_stored_as_it_always_was(tmp_path):
    """Older files and checkpoints know nothing of names, so a file of one channel has none."""
    src = mpmri(tmp_path / "src")
    chosen = convert(src, "--channel", 0)
    images, told = everything(chosen), chosen.prepared
    with h5py.File(chosen.path) as f:
        usual = {"format", "name", "classes", "dims", "channels", "standardize", "prepared"}
        assert set(f.attrs) == usual and bool(f.attrs["standardize"]) is True
    assert told.keys() == {"from", "spacing", "window", "channel", "nnunet", "axes"}
    assert told["channel"] == 0 and chosen.channel_names == ["image"]
    for path in (src / "imagesTr").glob("*_000[12]*"):
        path.unlink()
    alone = convert(src)
    assert alone.prepared == told | {"channel": None} and alone.channel_names == ["image"]
    assert all((everything(alone)[name] == image).all() for name, image in images.items())


def test_names_of_channels(tmp_path):
    """Those of the Decathlon, equal ones told apart, and numbers where nobody says any."""
    src = mpmri(tmp_path / "src", table={"modality": {"0": "MR", "1": "MR", "2": "PET"}})
    assert convert(src).channel_names == ["MR 0", "MR 1", "PET"]
    assert convert(src, "--channel", "2,1").channel_names == ["PET", "MR"]
    (src / "dataset.json").unlink()
    assert convert(src).channel_names == ["channel 0", "channel 1", "channel 2"]
    for path in (src / "imagesTr").glob("*_0000*"):
        path.unlink()
    info = convert(src)
    assert info.channel_names == ["channel 1", "channel 2"] and info.prepared["channel"] == [1, 2]


@pytest.mark.parametrize(
    "options, windows",
    [
        ([], [None, None, [-175, 250]]),
        (["--intensity", "mr"], [None] * 3),
        (["--intensity", "ct"], [[-175, 250]] * 3),
        (["--intensity", "ct", "--clip", "0,90"], [[0, 90]] * 3),
        (["--intensity", "ct", "--clip", "0,90;ADC=-400,0"], [[0, 90], [-400, 0], [0, 90]]),
        (["--clip", "ADC=-400,0"], [None, [-400, 0], [-175, 250]]),
        (["--clip=CT=-100,100"], [None, None, [-100, 100]]),
        (["--channel", "2,1"], [[-175, 250], None]),
    ],
)
def test_mr_and_ct_in_one_case(options, windows, tmp_path):
    src = mpmri(tmp_path / "src", "ab")
    info = convert(src, *options)
    standardize = [window is None for window in windows]
    expected = standardize if len(set(standardize)) == 2 else standardize[0]
    assert info.standardize == expected
    assert nifti.Preparation(**{k: v for k, v in info.prepared.items() if k != "from"}).windows == (
        windows
    )
    numbers = [2, 1] if "--channel" in options else [0, 1, 2]
    image = everything(info)["a"]
    for k, (n, window) in enumerate(zip(numbers, windows)):
        values = nifti.load(src / "imagesTr" / f"a_{n:04d}.nii.gz").values
        assert (image[..., k] == nifti.scale(values, window)).all()


def test_a_ct_among_others_that_is_not_in_hounsfield_units_is_named(tmp_path, capsys):
    src = mpmri(tmp_path / "src", "ab")
    for path in (src / "imagesTr").glob("*_0002*"):
        image = sitk.ReadImage(str(path))
        new = sitk.GetImageFromArray(sitk.GetArrayFromImage(image) + 2000)
        new.CopyInformation(image)
        sitk.WriteImage(new, str(path))
    convert(src)
    said = capsys.readouterr().out
    assert "2 of 2 volumes do not look like Hounsfield units" in said
    assert "channel 2 (CT), whose voxels" in said
    convert(src, "--intensity", "ct")  # all channels, of which two are not
    assert "2 of 2 volumes do not look like Hounsfield units" in capsys.readouterr().out


def test_prepared_of_several_channels_is_compared():
    window = [None, [-175.0, 250.0]]
    mixed = {"from": "nifti", "window": window, "names": ["T2", "CT scan"], "channel": None}
    said = lambda standardize, **more: dict(standardize=standardize, prepared=mixed | more)
    a = said([True, False])
    prepared.check({"d.h5": a}, {"b.pt": said([True, False])})
    others = {
        "window 's CT scan=0,9": said([True, False], window=[None, [0, 9]]),
        "case by case": said(True, window=None),
        "unknown window (standardize False, True)": dict(standardize=[False, True]),
    }
    for words, b in others.items():
        with pytest.raises(InputError) as found:
            prepared.check({"d.h5": a}, {"b.pt": b})
        assert words.replace("window 's", "windows") in str(found.value), found.value
        assert "clipped to the windows CT scan=-175,250" in str(found.value)
    with pytest.raises(InputError, match=r"again with --intensity mr --clip 'CT scan=-175,250'"):
        prepared.check({"d.h5": said(True, window=None)}, {"b.pt": a})


def test_other_channels_are_noted(capsys):
    about = {"from": "nifti", "window": None, "names": ["T2", "ADC"], "channel": [0, 1]}
    said = lambda **more: dict(prepared=about | more)
    prepared.check({"d.h5": said()}, {"b.pt": said(channel=[0, 2], names=["T2", "DWI"])})
    told = capsys.readouterr().out
    assert "names T2, DWI, channel 0,2 for b.pt, but names T2, ADC, channel 0,1 for d.h5" in told


# ------------------------------------------------------------------------------------ pictures

RNG = np.random.default_rng(0)
SIZE = (24, 40)
MASK = cv2.circle(np.zeros(SIZE, np.uint8), (18, 12), 8, 1, -1)


def stack(count, kind=np.uint8):
    noise = RNG.integers(0, 90, (*SIZE, count)).astype(kind)
    return noise + (100 * MASK[..., None] * (np.arange(count) + 1) / count).astype(kind)


def deflated(path, image):
    """Strips of 5 rows, with differences of pixels in place of values (predictor 2)."""
    H, W, C = image.shape
    steps = np.diff(image, axis=1, prepend=np.zeros((H, 1, C), image.dtype))
    strips = [zlib.compress(steps[y : y + 5].tobytes()) for y in range(0, H, 5)]
    write_parts(path, image, strips, t259=8, t278=5, t317=2)


def planar(path, image):
    """Each channel by itself, in strips of 10 rows."""
    H, _, C = image.shape
    strips = [image[y : y + 10, :, c].tobytes() for c in range(C) for y in range(0, H, 10)]
    write_parts(path, image, strips, t284=2, t278=10)


def tiled(path, image):
    """Tiles of 16 x 16, deflated, with differences of pixels."""
    H, W, C = image.shape
    whole = np.pad(image, [(0, -H % 16), (0, -W % 16), (0, 0)])
    tiles = []
    for y in range(0, H, 16):
        for x in range(0, W, 16):
            tile = whole[y : y + 16, x : x + 16]
            zero = np.zeros((16, 1, C), image.dtype)
            tiles.append(zlib.compress(np.diff(tile, axis=1, prepend=zero).tobytes()))
    write_parts(path, image, tiles, (324, 325), t259=8, t317=2, t322=16, t323=16)


def write_parts(path, image, parts, places=(273, 279), **tags):
    """A TIFF whose pixels lie in several strips or tiles."""
    write_tiff(path, image, **tags)
    content, start = path.read_bytes()[:8], 8
    found = {257: [image.shape[0]], 256: [image.shape[1]], 262: [1], 277: [image.shape[2]]}
    bits = image.itemsize * 8
    found |= {258: [bits] * image.shape[2], 338: [0] * (image.shape[2] - 1)}
    found |= {339: [3 if image.dtype.kind == "f" else 1]}
    found |= {int(name[1:]): [value] for name, value in tags.items()}
    found[places[1]] = list(map(len, parts))
    found[places[0]] = [start + sum(map(len, parts[:i])) for i in range(len(parts))]
    body = b"".join(parts)
    end = start + len(body) + len(body) % 2
    content = content[:4] + end.to_bytes(4, "little") + body.ljust(end - 8, b"\0")
    path.write_bytes(content + pixels.directory(found, "<", end))


def of_imagej(path, image, said="channels={0}\n"):
    """Pages of one channel each, as ImageJ says."""
    text = f"ImageJ=1.53t\nimages={image.shape[-1]}\n" + said.format(image.shape[-1])
    pages = [pixels.Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
    pages[0].save(path, save_all=True, append_images=pages[1:], tiffinfo={270: text})


KINDS = {
    "two": (write_tiff, stack(2)),
    "three gray": (write_tiff, stack(3)),
    "four gray": (write_tiff, stack(4, np.uint16)),
    "five of RGB": (lambda path, image: write_tiff(path, image, t262=2), stack(5)),
    "seven": (write_tiff, stack(7, np.float32)),
    "deflated": (deflated, stack(5, np.uint16)),
    "planar": (planar, stack(6, np.uint16)),
    "tiled": (tiled, stack(3)),
    "ImageJ": (of_imagej, stack(3, np.uint16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tiffs_of_several_channels_keep_every_value(kind, tmp_path):
    write, image = KINDS[kind]
    write(path := tmp_path / "a.tif", image)
    assert pixels.channels_in(path) == image.shape[-1]
    found = pixels.read_channels([path])
    assert found.dtype == (np.uint8 if image.dtype == np.uint8 else np.float32)
    assert found.shape == image.shape and (found == image).all()
    for read in (lambda: pixels.read_picture(path, True), lambda: pixels.read_mask(path, "ab")):
        with pytest.raises(InputError, match="a.tif: has"):
            read()


def test_a_wrong_checksum_of_channels_is_damage(tmp_path):
    write, image = KINDS["deflated"]
    write(path := tmp_path / "a.tif", image)
    content = bytearray(path.read_bytes())
    tags, _ = pixels.read_tags(bytes(content))
    content[tags[0][273][1] - 1] ^= 1  # the last byte of the first strip
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.tif: not a readable picture"):
        pixels.read_channels([path])


@pytest.mark.parametrize("said", ["channels=3\nslices=3\n", "slices=3\n", "channels=2\n", ""])
def test_pages_that_may_be_something_else_are_no_channels(said, tmp_path):
    of_imagej(path := tmp_path / "a.tif", stack(3), said)
    assert pixels.channels_in(path) == 0
    with pytest.raises(InputError, match="a.tif: has 3 pages"):
        pixels.read_channels([path])


def microscopy(folder, kind, count=4):
    """Cases of three channels, as a TIFF each or as gray pictures in folders. -> {case: image}"""
    cases = {f"c{i}": stack(3) for i in range(count)}
    (folder / "masks").mkdir(parents=True)
    for part in ("phase", "dapi", "gfp") if kind == "folders" else ("images",):
        (folder / part).mkdir()
    for name, image in cases.items():
        cv2.imwrite(str(folder / "masks" / f"{name}.png"), MASK * 255)
        if kind == "tiffs":
            write_tiff(folder / "images" / f"{name}.tif", image)
            continue
        for c, part in enumerate(("phase", "dapi", "gfp")):
            # a gray picture that is stored in color, too
            saved = image[..., c] if part != "gfp" else np.dstack([image[..., c]] * 3)
            cv2.imwrite(str(folder / part / f"{name}.png"), saved)
    return cases


def of_pictures(src, *options):
    out = str(src.parent / "f.h5")
    images.main([str(src), "--out", out, "--val", "0.25", *options])
    return h5.read_info(out)


def test_pictures_of_several_channels_come_back(tmp_path):
    for kind, options, names in (
        ("tiffs", [], ["channel 0", "channel 1", "channel 2"]),
        ("folders", ["--channels", "phase,dapi,gfp"], ["phase", "dapi", "gfp"]),
    ):
        cases = microscopy(tmp_path / kind, kind)
        info = of_pictures(tmp_path / kind, *options)
        assert info.channel_names == names and info.channels == 3 and not info.color
        found = everything(info)
        assert found.keys() == cases.keys()
        assert all((found[name][0] == image).all() for name, image in cases.items())
        assert all(e.labeled for entries in info.splits.values() for e in entries)
        small = of_pictures(tmp_path / kind, *options, "--size", "16")
        expected = cv2.resize(cases["c1"], (16, 16), interpolation=cv2.INTER_AREA)
        assert (everything(small)["c1"][0] == expected).all()
    info = of_pictures(tmp_path / "folders", "--channels", "gfp,phase")
    assert info.channel_names == ["gfp", "phase"]
    assert (everything(info)["c1"][0] == cases["c1"][..., [2, 0]]).all()


def test_many_channels_are_resized(tmp_path):
    (tmp_path / "src" / "images").mkdir(parents=True)
    image = stack(7)
    for name in "abc":
        write_tiff(tmp_path / "src" / "images" / f"{name}.tif", image)
    found = everything(of_pictures(tmp_path / "src", "--size", "16"))["a"][0]
    expected = [cv2.resize(image[..., c], (16, 16), interpolation=cv2.INTER_AREA) for c in range(7)]
    assert (found == np.dstack(expected)).all()


def test_depths_of_channels_may_differ(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), deep := stack(1, np.uint16)[..., 0] + 1000)
    cv2.imwrite(str(tmp_path / "b.png"), gray := stack(1)[..., 0])
    found = pixels.read_channels([tmp_path / "a.png", tmp_path / "b.png"])
    assert found.dtype == np.float32
    assert (found[..., 0] == deep).all() and (found[..., 1] == gray).all()


# ------------------------------------------------------------------------------------ BraTS


def brats(folder, image, label):
    """Three cases of the BraTS layout; image, label: of a number of a case"""
    (folder / "data").mkdir(parents=True)
    for i in range(3):
        with h5py.File(folder / "data" / f"BraTS19_{i}_1.h5", "w") as f:
            f["image"] = image(i)
            if label(i) is not None:
                f["label"] = label(i)
    (folder / "train.txt").write_text("BraTS19_1_1\nBraTS19_0_1,0.5\n")
    (folder / "val.txt").write_text("BraTS19_2_1\n")
    return folder


def from_brats(src, *options):
    out = str(src.parent / "f.h5")
    ssl4mis.main([str(src), "--out", out, *options])
    return h5.read_info(out)


FLAIR = np.random.default_rng(5).random((4, 18, 20, 22)).astype(np.float32)
TUMOR = ball((18, 20, 22), (9, 9, 12), 6)


def test_the_brats_layout(tmp_path):
    """FLAIR alone, as the baselines have it: the axes stay, and the order of the list."""
    src = brats(tmp_path / "src", lambda i: FLAIR[i], lambda i: None if i == 1 else TUMOR)
    info = from_brats(src)
    assert (info.name, info.classes) == ("BraTS", ["background", "whole tumor"])
    assert (info.dims, info.channels, info.channel_names) == (3, 1, ["image"])
    assert {s: [e.name[8] for e in es] for s, es in info.splits.items()} == {
        "train": ["1", "0"],
        "val": ["2"],
    }
    for i, image in enumerate(everything(info)[f"BraTS19_{i}_1"] for i in range(3)):
        assert (image == FLAIR[i]).all()
    assert (load(info, "val", "BraTS19_2_1")[1] == TUMOR).all()
    (src / "val.txt").unlink()
    assert [e.name[8] for e in from_brats(src, "--val", "1").splits["val"]] == ["0"]


@pytest.mark.parametrize("last", [False, True])
def test_sequences_of_brats_are_channels(last, tmp_path):
    """Whether theirs is the first axis or the last one; a case without a label, too."""
    moved = np.moveaxis(FLAIR, 0, -1)
    labels = lambda i: None if i == 1 else TUMOR
    src = brats(tmp_path / "src", lambda i: (moved if last else FLAIR) + i, labels)
    info = from_brats(src)
    assert info.channel_names == [f"channel {k}" for k in range(4)]
    for i in range(3):
        assert (everything(info)[f"BraTS19_{i}_1"] == moved + i).all()
    small = from_brats(src, "--shrink", "2")
    image = everything(small)["BraTS19_0_1"]
    blocks = moved.reshape(9, 2, 10, 2, 11, 2, 4).mean((1, 3, 5))
    assert image.shape == (9, 10, 11, 4) and np.allclose(image, blocks, atol=1e-6)


# ------------------------------------------------------------------------------------ new images


@pytest.fixture
def bright(monkeypatch):
    """A network that needs no training."""
    load_run = checkpoints.load_run
    monkeypatch.setattr(checkpoints, "load_run", lambda *args: (Bright(), load_run(*args)[1]))


def masks(folder):
    return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in folder.iterdir()}


@pytest.mark.parametrize(
    "options, trained_on_4d",
    [
        ([], False),
        (["--channel", "2,0", "--spacing", "8,2,2"], False),
        (["--channel", "2,0"], True),
        (["--intensity", "mr"], True),
    ],
)
def test_new_volumes_of_several_channels(options, trained_on_4d, bright, tmp_path, capsys):
    """The same masks through a dataset, through files of each channel, and through 4D files."""
    src = mpmri(tmp_path / "src")
    mpmri(src, "xy", tr="Ts", labels=False)
    if trained_on_4d:
        in_4d(src), in_4d(src, "xy", "Ts")
    info = convert(src, *options)
    run = make_run(tmp_path / "run", info, size=(16, 32, 32))
    new = mpmri(tmp_path / "new", "xy", tr="Ts", labels=False)
    sources = {"h5": info.path, "files": new / "imagesTs"}
    found = {}
    for name, source in sources.items():
        more = ["--split", "test"] if name == "h5" else []
        out = str(tmp_path / name)
        evaluate.main([str(source), run, "--predict", "--out", out, *more])
        found[name] = masks(tmp_path / name / "masks")
    in_4d(new, "xy", "Ts")
    evaluate.main([str(new / "imagesTs"), run, "--predict", "--out", str(tmp_path / "4d")])
    found["4d"] = masks(tmp_path / "4d" / "masks")
    assert all(each.keys() == {"x.nii.gz", "y.nii.gz"} for each in found.values())
    for name in ("x.nii.gz", "y.nii.gz"):
        mask = found["h5"][name]
        assert mask.shape == PLACE["shape"] and 0 < mask.mean() < 1
        assert (found["files"][name] == mask).all() and (found["4d"][name] == mask).all()
    assert "note: the checkpoint" not in capsys.readouterr().out


def test_new_volumes_of_other_channels_are_refused(tmp_path, refused, capsys):
    info = convert(mpmri(tmp_path / "src"))
    run = make_run(tmp_path / "run", info, size=(16, 32, 32))
    new = mpmri(tmp_path / "new", "xy", tr="Ts", labels=False) / "imagesTs"
    argv = [new, run, "--predict", "--out", tmp_path / "o"]
    save(extra := new / "y_0003.nii.gz", np.zeros(PLACE["shape"], np.float32))
    refused(evaluate.main, argv, "case 'y' has 4 channels", "T2, ADC, CT", "take the others out")
    extra.unlink()
    (new / "y_0001.nii.gz").rename(tmp_path / "kept.nii.gz")
    refused(evaluate.main, argv, "case 'y' has no channel 1")
    other = sitk.ReadImage(str(tmp_path / "kept.nii.gz"))
    other.SetOrigin((3.0, 5.0, 7.0))
    sitk.WriteImage(other, str(new / "y_0001.nii.gz"))
    refused(evaluate.main, argv, "case 'y', channel 1 (ADC)", "origin", "another grid")
    for path in new.glob("y_*"):
        path.unlink()
    for count, words in ((2, "no channel 2"), (4, "'x' has 4 channels")):
        for path in new.iterdir():
            path.unlink()
        sitk.WriteImage(
            joined(*[np.eye(16, dtype=np.float32)[None] * np.ones((9, 1, 1), np.float32)] * count),
            str(new / "x.nii.gz"),
        )
        refused(evaluate.main, argv, "x.nii.gz", words)
    chosen = convert(tmp_path / "src", "--channel", "0,1")
    run = make_run(tmp_path / "some", chosen, size=(16, 32, 32))
    new_images.convert(str(new), str(tmp_path / "n.h5"), chosen.describe())
    assert h5.read_info(str(tmp_path / "n.h5")).channel_names == ["T2", "ADC"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": ["T2", "ADC"]},
        {"names": ["T2", "ADC", "PET"]},
        {"names": None},
        {"names": "T2,"},
        {"channel": [0, 1]},
        {"channel": [0, 1, 1]},
        {"channel": [0, 1, True]},
        {"channel": 1},
        {"channel": "012"},
        {"window": [None, None]},
        {"window": [None, None, [1, 1]]},
        {"window": [None, None, [1]]},
        {"window": [None, None, "ct"]},
        {"folders": ["T2", "ADC"]},
        {"folders": ["T2", "..", "CT"]},
        {"folders": 3},
    ],
)
def test_strange_words_of_a_checkpoint_on_its_channels(wrong, tmp_path):
    src = mpmri(tmp_path / "src", "a")
    right = {"from": "nifti", "names": ["T2", "ADC", "CT"], "nnunet": True, "window": None}
    data = dict(classes=["background", "x"], dims=3, channels=3, channel_names=right["names"])
    new_images.convert(str(src), str(tmp_path / "n.h5"), data | dict(prepared=right))
    with pytest.raises(InputError, match="cannot be understood"):
        new_images.convert(str(src), str(tmp_path / "n.h5"), data | dict(prepared=right | wrong))


@pytest.mark.parametrize("names", ["abc", ["T2", "CT"], [1, 2, 3], None, 3, {"a": 1}])
def test_strange_names_of_channels_in_a_checkpoint(names, tmp_path):
    src = mpmri(tmp_path / "src", "a")
    data = dict(classes=["background", "x"], dims=3, channels=3, channel_names=names)
    with pytest.raises(InputError, match="cannot be understood"):
        new_images.convert(str(src), str(tmp_path / "n.h5"), data)


def test_channels_of_a_checkpoint_that_does_not_know_more(tmp_path, capsys):
    """Each is taken as MR."""
    src = mpmri(tmp_path / "src", "a")
    names = ["T2", "ADC", "CT"]
    data = dict(classes=["background", "x"], dims=3, channels=3, channel_names=names)
    info = new_images.convert(str(src), str(tmp_path / "n.h5"), data)
    assert "note: the checkpoint does not say how its data" in capsys.readouterr().out
    assert info.channel_names == names and info.prepared is None
    alone = nifti.scale(nifti.load(src / "imagesTr" / "a_0001.nii.gz").values, None)
    assert (everything(info)["a"][..., 1] == alone).all()


@pytest.mark.parametrize("kind", ["tiffs", "folders"])
def test_new_pictures_of_several_channels(kind, bright, tmp_path, refused):
    cases = microscopy(tmp_path / "src", kind)
    options = ["--channels", "phase,dapi,gfp"] if kind == "folders" else []
    info = of_pictures(tmp_path / "src", *options)
    run = make_run(tmp_path / "run", info)
    new = tmp_path / "new"
    microscopy(new, kind)
    found = new_images.convert(str(new), str(tmp_path / "n.h5"), info.describe())
    assert found.channel_names == info.channel_names
    assert len(found.entries("unlabeled")) == len(cases)
    read = tmp_path / "src"
    for name, image in everything(
        new_images.convert(str(read), str(tmp_path / "n.h5"), info.describe())
    ).items():
        assert (image[0] == cases[name]).all()
    evaluate.main([str(new), run, "--predict", "--out", str(tmp_path / "o")])
    assert {p.stem for p in (tmp_path / "o" / "masks").iterdir()} == cases.keys()
    argv = [new, run, "--predict", "--out", tmp_path / "p"]
    if kind == "tiffs":
        write_tiff(new / "images" / "c1.tif", stack(2))
        refused(evaluate.main, argv, "c1.tif", "has 2 channels", "3 channels (channel 0, channel 1")
        cv2.imwrite(str(new / "images" / "c1.tif"), stack(3))
        refused(evaluate.main, argv, "c1.tif", "is gray or RGB", "3 channels")
        return
    (new / "dapi" / "c1.png").unlink()
    refused(evaluate.main, argv, "case 'c1' has no channel dapi")
    cv2.imwrite(str(new / "dapi" / "c1.png"), stack(3))
    refused(evaluate.main, argv, "dapi/c1.png", "colored")
    for path in (new / "dapi").iterdir():
        path.unlink()
    (new / "dapi").rmdir()
    refused(evaluate.main, argv, "new/dapi", "no such folder", "phase, dapi, gfp")
    refused(evaluate.main, [new / "gfp" / "c1.png", *argv[1:]], "no such folder")


def test_three_channels_of_an_old_checkpoint_are_rgb(tmp_path):
    """It does not name them. Others are not taken for colors."""
    image = stack(3)
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    data = dict(classes=["background", "x"], dims=2, channels=3, prepared={"from": "pictures"})
    info = new_images.convert(str(tmp_path / "a.png"), str(tmp_path / "n.h5"), data)
    assert info.color and (everything(info)["a"][0] == image).all()
    with pytest.raises(InputError, match="a.png: is gray or RGB, but the network has learned"):
        new_images.convert(
            str(tmp_path / "a.png"), str(tmp_path / "n.h5"), data | dict(channel_names=list("abc"))
        )


def test_ct_by_the_name_of_dataset_json(tmp_path, capsys):
    """Twice, and with a blank; of a single channel it is a note, since it was MR before."""
    names = {"0": "ct ", "1": "CT", "2": "MR"}
    src = mpmri(tmp_path / "src", table={"channel_names": names})
    info = convert(src)
    assert info.channel_names == ["ct", "CT", "MR"] and info.standardize == [False, False, True]
    table = {"channel_names": names | {"0": "CT"}}
    info = convert(mpmri(tmp_path / "twice", table=table))
    assert info.channel_names == ["CT 0", "CT 1", "MR"]
    assert info.standardize == [False, False, True]
    capsys.readouterr()
    assert convert(src, "--channel", "1").standardize is True
    assert "dataset.json calls the images CT, but they are taken as MR" in capsys.readouterr().out
    convert(src, "--channel", "2"), convert(src, "--channel", "1", "--intensity", "ct")
    assert "calls the images CT" not in capsys.readouterr().out
    assert convert(mpmri(tmp_path / "none", table={"modality": {}})).channels == 3


def test_an_empty_channel_is_not_taken_for_an_empty_label(tmp_path):
    src = mpmri(tmp_path / "src")
    for path in (src / "imagesTr" / "a_0001.nii.gz", src / "labelsTr" / "a.nii.gz"):
        old = sitk.ReadImage(str(path))
        new = sitk.GetImageFromArray(0 * sitk.GetArrayFromImage(old))
        new.CopyInformation(old)
        sitk.WriteImage(new, str(path))
    assert convert(src).channels == 3


def test_a_channel_of_one_value_is_no_noise(tmp_path):
    """Rounding, when it is resized, must not be divided by nothing."""
    image = np.full((64, 64, 2), 1000.1, np.float32)
    image[..., 1] = np.random.default_rng(0).random((64, 64))
    case = h5.Case("train", "a", image, None, "a")
    about = dict(name="f", classes=["background", "a"], dims=2, channels=2)
    info = h5.write(str(tmp_path / "f.h5"), [case], channel_names=["a", "b"], **about)
    for size in (37, 64):
        x, _ = loading.load_slices(info, "train", size, labels=False).batch([0])
        assert x[:, 0].abs().max() < 0.1 and x[:, 1].std() > 0.3
    resized = loading.resize_image(image, 37)
    assert h5.is_flat(resized[..., 0]) and not h5.is_flat(resized[..., 1])
    assert "a of train/a" in h5.summary(info)


def test_new_channels_that_show_nothing_are_noted(tmp_path, capsys):
    info = convert(mpmri(tmp_path / "src"))
    src = mpmri(tmp_path / "new", labels=False)
    path = src / "imagesTr" / "b_0001.nii.gz"
    old = sitk.ReadImage(str(path))
    new = sitk.GetImageFromArray(np.full_like(sitk.GetArrayFromImage(old), 7))
    new.CopyInformation(old)
    sitk.WriteImage(new, str(path))
    new_images.convert(str(src / "imagesTr"), str(tmp_path / "n.h5"), info.describe())
    said = capsys.readouterr().out
    assert "note: 1 images have one value everywhere, such as ADC of b" in said
    plain = mpmri(tmp_path / "plain", channels=1, labels=False)
    for path in (plain / "imagesTr").glob("*.nii.gz"):
        path.rename(path.with_name(path.name.replace("_0000", "")))
    with pytest.raises(InputError, match="holds one volume, but .* 3 channels"):
        new_images.convert(str(plain / "imagesTr"), str(tmp_path / "p.h5"), info.describe())
