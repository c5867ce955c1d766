"""Files of several channels that are no colors, from the schema to the masks of new images."""

import h5py
import numpy as np
import pytest
import torch
from conftest import quality, shared
from test_ssl import AT_ONCE, by_hand, train

import evaluate
import train_ssl
from data import augment, figures, h5, loading
from data.files import InputError
from models import inference
from models.device import compute

NAMES = ["t1", "t2", "flair", "adc"]
GRID = {2: 32, 3: (16, 16, 32)}
METHODS = [(dims, method) for dims in GRID for method in train_ssl.METHODS]


def four(path, source):
    """The cases of a file with four channels, each of its own scale: gray, negative, dark, noise"""
    info = h5.read_info(source)
    rng = np.random.default_rng(0)
    with h5.open_file(source) as f:
        cases = []
        for split, entries in info.splits.items():
            for e in entries:
                gray = figures.to_gray_levels(f[split][e.name]["image"][()])
                noise = rng.integers(0, 50, gray.shape, np.uint8)
                image = np.stack([gray, 255 - gray, gray // 4, noise], -1)
                label = f[split][e.name]["label"][()]
                cases.append(h5.Case(split, e.name, image, label, e.patient, e.spacing))
    about = dict(name="four", classes=info.classes, dims=info.dims)
    return h5.write(str(path), cases, channels=4, channel_names=NAMES, **about)


@pytest.fixture(scope="session")
def files(gray, volumes, tmp_path_factory):
    """{dims: a file of four channels}"""

    def make(folder):
        for dims, source in ((2, gray), (3, volumes)):
            four(folder / f"{dims}.h5", source)

    folder = shared(tmp_path_factory, "four", make)
    return {dims: str(folder / f"{dims}.h5") for dims in GRID}


@pytest.fixture(scope="session")
def predictors(files, tmp_path_factory):
    """{dims: qp.pt}"""

    def make(folder):
        for dims, size in ((2, "32"), (3, "16,16,32")):
            small = dict(size=size, val=1, epochs="1", members=1, masks=2)
            quality(files[dims], folder / str(dims), **small)

    folder = shared(tmp_path_factory, "four_quality", make)
    return {dims: str(folder / str(dims) / "qp.pt") for dims in GRID}


@pytest.mark.parametrize("dims", GRID)
def test_each_channel_has_its_own_scale_wherever_it_is_kept(dims, files):
    info = h5.read_info(files[dims])
    assert info.channel_names == NAMES and not info.color
    load = loading.load_slices if dims == 2 else loading.load_volumes
    held, stored = (f(info, "train", GRID[dims]) for f in (load, loading.Stored))
    index = torch.arange(3)
    place = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    for one, other in zip(held.fetch(index, place), stored.fetch(index, place), strict=True):
        assert torch.equal(one, other)
    for case in loading.whole_cases(info, "train"):
        scaled = case.image - np.reshape(case.mean, (4, 1, 1, 1))
        scaled = scaled / np.reshape(case.std, (4, 1, 1, 1))
        assert case.image.shape[0] == 4
        assert np.allclose(scaled.mean((1, 2, 3)), 0) and np.allclose(scaled.std((1, 2, 3)), 1)
        whole = held.case.index(case.name)
        assert torch.allclose(held.mean[whole].float(), torch.tensor(case.mean)) if dims == 2 else 1
    x, _ = loading.standardized(held.fetch(index, place), "cpu")
    assert torch.allclose(x[:, 0], -x[:, 1], atol=1e-4)  # the negative, by its own mean and std


def test_some_channels_come_ready(files, tmp_path):
    info = h5.read_info(files[2])
    with h5.open_file(info.path) as f:
        image = h5.read_case(f, info, "train", info.splits["train"][0].name)[0]
    case = h5.Case("train", "a", image.astype(np.float32), None, "a")
    about = dict(name="m", classes=["background", "a"], dims=2, channels=4, channel_names=NAMES)
    path = str(tmp_path / "m.h5")
    mixed = h5.write(path, [case], standardize=[True, False, True, True], **about)
    assert mixed.standardize == [True, False, True, True] == mixed.describe()["standardize"]
    (read,) = loading.whole_cases(mixed, "train", labels=False)
    assert (read.mean[1], read.std[1]) == (0, 1) and read.mean[0] == pytest.approx(
        image[..., 0].mean()
    )
    assert loading.Stored(mixed, "train", 32, labels=False).items[0].mean == read.mean
    assert h5.write(path, [case], standardize=[False] * 4, **about).standardize is False
    assert h5.write(path, [case], standardize=[True] * 4, **about).standardize is True
    for wrong in ([True], [True] * 5):
        with pytest.raises(InputError, match="standardize"):
            h5.write(path, [case], standardize=wrong, **about)


@pytest.mark.parametrize(
    "channels, names, words",
    [
        (65, [f"c{i}" for i in range(65)], "1 to 64 channels"),
        (0, [], "1 to 64 channels"),
        (2, None, "0 channel_names for 2"),
        (2, ["a"], "1 channel_names for 2"),
        (2, ["a", "a"], "two channels are called 'a'"),
        (2, ["a", ""], "must be printable"),
        (3, ["a", "b", "c"], "does not fit 3 channel"),
    ],
)
def test_channels_that_are_refused(channels, names, words, tmp_path):
    image = np.zeros((16, 16, min(2, channels)), np.uint8)
    case = h5.Case("train", "a", image, None, "a")
    about = dict(name="n", classes=["background", "a"], dims=2)
    with pytest.raises(InputError, match=words):
        h5.write(str(tmp_path / "n.h5"), [case], channels=channels, channel_names=names, **about)


@pytest.mark.parametrize(
    "name, value",
    [("channel_names", NAMES[:3]), ("channel_names", 4), ("standardize", [True, False])],
)
def test_attributes_that_are_refused(name, value, files, tmp_path):
    (tmp_path / "bad.h5").write_bytes(open(files[2], "rb").read())
    with h5py.File(tmp_path / "bad.h5", "a") as f:
        f.attrs[name] = value
    with pytest.raises(InputError, match=name):
        h5.read_info(str(tmp_path / "bad.h5"))


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 12, 20, 16)])
def test_colors_change_together_and_other_channels_each_for_itself(shape):
    image = torch.randn(shape[0], 1, *shape[2:]).expand(shape).clone()
    torch.manual_seed(0)
    mine = augment.strong(image)
    assert all(not torch.allclose(mine[:, 0], mine[:, c], atol=0.3) for c in (1, 2))
    torch.manual_seed(0)
    alone = augment.strong(image.flatten(0, 1)[:, None])
    assert torch.equal(mine, alone.reshape(shape))

    torch.manual_seed(0)
    colors = augment.strong(image, 0.2, color=True).flatten(2)
    cast = colors - colors.mean(1, keepdim=True)
    assert (cast.std(2) < 0.1).all() and (cast.mean(2).abs() > 0.001).all()  # one number, and noise


@pytest.mark.parametrize("dims, method", METHODS)
def test_two_steps_of_every_method(dims, method, files, predictors, tmp_path):
    """From disk, but without processes that read (tests/test_feed.py has those)."""
    hooks = ["--weight", "quality", "--qar", 0.01, "--cache", "off", "--workers", 0, *AT_ONCE]
    more = ["--correct"] if method != "supervised" else []
    _, run, parts = by_hand(files[dims], predictors[dims], "--method", method, *hooks, *more)
    assert len(parts) == 2 and parts.isfinite().all() and (parts[:, 3] > 0).all()  # QAR
    assert next(run.nets[0].parameters()).shape[1] == 4


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("dims", GRID)
def test_the_other_stages(dims, files, predictors, tmp_path, monkeypatch, refused):
    """Pictures show the channel that --show names; a file of other channels is refused."""
    data, qp = files[dims], predictors[dims]
    train(data, tmp_path / "f", "--steps", 2)
    best = str(tmp_path / "f" / "best.pt")
    shown = []
    draw = evaluate.figures.draw
    monkeypatch.setattr(
        evaluate.figures, "draw", lambda axis, p: (shown.append(p.image), draw(axis, p))
    )
    for name in ("t1", "adc"):
        out = ["--out", str(tmp_path / name), "--show", name, "--pictures", "1"]
        evaluate.main([data, best, "--qp", qp, *out])
    half = len(shown) // 2
    assert half and {image.ndim for image in shown} == {2}
    assert all((a != b).any() for a, b in zip(shown[:half], shown[half:]))
    assert max(image.max() for image in shown[half:]) < 50  # adc is noise below 50
    evaluate.main([data, best, "--predict", "--split", "test", "--out", str(tmp_path / "new")])
    assert list((tmp_path / "new" / "masks").iterdir())
    wrong = [data, best, "--out", str(tmp_path / "x"), "--show", "t3"]
    refused(evaluate.main, wrong, "--show t3", "t1, t2, flair, adc")
    h5.main([data, "--preview", str(tmp_path / "p.png"), "--show", "flair"])

    other = str(tmp_path / "other.h5")
    (tmp_path / "other.h5").write_bytes(open(data, "rb").read())
    with h5py.File(other, "a") as f:
        f.attrs["channel_names"] = NAMES[::-1]
    out = ["--out", str(tmp_path / "y")]
    refused(evaluate.main, [other, best, *out], "channel_names", "train on this data")
    size = ["--size", "32" if dims == 2 else "16,16,32"]
    guided = [other, "--method", "pseudo_label", "--weight", "quality", "--qp", qp, *size]
    refused(train_ssl.main, [*guided, *out], "channel_names", "train g on this data")
    second = [data, "--method", "pseudo_label", "--unlabeled", other, *size, "--labeled", "2"]
    refused(train_ssl.main, [*second, *out], "channel_names", "convert both alike")


def test_a_volume_in_windows_is_the_volume_at_once(files):
    """A network that looks at one voxel answers alike in any window, channel by channel."""
    info = h5.read_info(files[3])
    net = torch.nn.Conv3d(4, 3, 1)
    net.config = dict(dims=3)
    on = compute("cpu", "off")
    cases = inference.Cases(info, "val", GRID[3])
    window = inference.Window((16, 16, 32), (8, 8, 16))
    for (entry, label, _), case in zip(inference.predict_cases(net, cases, on, window), cases):
        image = case.image.image - np.reshape(case.image.mean, (4, 1, 1, 1))
        x = torch.tensor(image / np.reshape(case.image.std, (4, 1, 1, 1))).float()
        whole = net(x[None])[0].argmax(0).numpy()
        assert label.shape == entry.grid and (label != whole).mean() < 1e-4


def test_a_channel_that_shows_nothing_is_noted(files, tmp_path, capsys):
    (tmp_path / "f.h5").write_bytes(open(files[2], "rb").read())
    with h5py.File(tmp_path / "f.h5", "a") as f:
        group = f["train"][next(iter(f["train"]))]
        group["image"][..., 2] = 7
        group.attrs["checksum"] = h5.checksum_of(group["image"][()], group["label"][()])
    h5.main([str(tmp_path / "f.h5")])
    said = capsys.readouterr().out
    assert "4 channel(s): t1, t2, flair, adc" in said and "(1 in all)" in said
    assert "everywhere: flair of train/" in said


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("size", [17, 40])
def test_many_channels_are_resized_each_as_if_alone(kind, size):
    image = (np.random.default_rng(0).random((20, 30, 7)) * 255).astype(kind)
    out = loading.resize_image(image, size)
    assert out.shape == (size, size, 7) and out.dtype == kind
    for c in range(7):
        assert (out[..., c] == loading.resize_image(image[..., c], size)).all()
