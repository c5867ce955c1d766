"""Small datasets that the tests share: a gray phantom of 4 classes, and RGB pictures of 2.

Made once, by the converters' own commands.
"""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import corrupt  # noqa: E402
import train_qp  # noqa: E402
from data import figures, h5, images, phantom  # noqa: E402
from data.options import cli  # noqa: E402

torch.set_num_threads(1)  # two workers of pytest-xdist, two cores
cv2.setNumThreads(1)
os.fsync = lambda fd: None  # thousands of checkpoints, none of which has to outlive a power failure


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CUDA, and is skipped without it")


def shared(factory, name, make):
    """A folder that make(folder) fills, once for all of pytest-xdist's workers."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / f"{name}.lock"):
        if not (base / name).exists():
            (base / f"{name}.part").mkdir()
            make(base / f"{name}.part")
            (base / f"{name}.part").rename(base / name)
    return base / name


def make_pictures(folder, count, seed=0, size=(40, 56)):
    """A folder of the `folder` preset: bright ellipses on clutter, masks with in-between values."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True), (folder / "masks").mkdir()
    for i in range(count):
        mask = np.zeros(size, np.uint8)
        center = (int(rng.integers(15, size[1] - 15)), int(rng.integers(12, size[0] - 12)))
        cv2.ellipse(
            mask,
            center,
            (int(rng.integers(5, 12)), int(rng.integers(5, 10))),
            float(rng.uniform(0, 180)),
            0,
            360,
            255,
            -1,
        )
        picture = rng.integers(0, 90, (*size, 3)) + (mask[..., None] > 0) * rng.integers(60, 140, 3)
        cv2.imwrite(str(folder / "images" / f"p{i}.png"), picture.astype(np.uint8))
        cv2.imwrite(str(folder / "masks" / f"p{i}.png"), cv2.GaussianBlur(mask, (3, 3), 0))
    return folder


@pytest.fixture(scope="session")
def gray(tmp_path_factory):
    """Phantom: 6 + 2 + 1 patients, volumes of 4 x 48 x 48, 4 classes, segmented slice by slice."""

    def make(folder):
        sizes = "--train 6 --val 2 --test 1 --depth 4 --size 48"
        phantom.main(["--out", str(folder / "phantom.h5"), *sizes.split()])

    return str(shared(tmp_path_factory, "gray", make) / "phantom.h5")


@pytest.fixture(scope="session")
def volumes(tmp_path_factory):
    """Phantom: 6 + 2 + 1 patients, volumes of 20 x 40 x 36, 4 classes, segmented in 3D."""

    def make(folder):
        path = folder / "volumes.h5"
        sizes = "--train 6 --val 2 --test 1 --depth 20 --size 40 --dims 3"
        phantom.main(["--out", str(path), *sizes.split()])
        with h5py.File(path, "a") as f:  # no cube: axes must not be confused
            for case in (case for split in f.values() for case in split.values()):
                image, label = case["image"][:, :, :36], case["label"][:, :, :36]
                del case["image"], case["label"]
                case["image"], case["label"] = image, label
                case.attrs["mean"], case.attrs["std"] = h5.mean_and_std(image)
                case.attrs["checksum"] = h5.checksum_of(image, label)

    return str(shared(tmp_path_factory, "volumes", make) / "volumes.h5")


@pytest.fixture(scope="session")
def rgb(tmp_path_factory):
    """Pictures: 9 train, 3 val, 40 x 56 pixels, RGB, 2 classes."""

    def make(folder):
        source = make_pictures(folder / "src", 12)
        images.main([str(source), "--out", str(folder / "rgb.h5"), "--val", "0.25"])

    return str(shared(tmp_path_factory, "rgb", make) / "rgb.h5")


class FakeG(torch.nn.Module):
    """A g whose answers are functions of what it sees, a Seen; it keeps what it was asked about."""

    def __init__(self, dice=None, error=None, belief=None, classes=None):
        super().__init__()
        self.config = dict(classes=classes)
        self.answers = dict(dice=dice, error=error, belief=belief)
        self.asked = []

    def answer(self, name, seen):
        self.asked.append(seen)
        return self.answers[name](seen)

    def forward(self, seen):
        return self.answer("dice", seen)

    def error(self, seen):
        return self.answer("error", seen)

    def belief(self, seen):
        return self.answer("belief", seen)


def quality(data, folder, *, size="32", val=4, epochs="1,2", members=2, masks=8):
    """The first two stages on a dataset, as small as they go. -> vqm.h5, qp.pt"""
    masks = f"--labeled 4 --size {size} --patches 2 --masks {masks} --val-masks {val} --folds 2"
    harvest = f"--harvest-share 0.25 --harvest-epochs {epochs} --harvest-steps 2 --harvest-batch 4"
    corrupt.main([data, "--out", str(folder), *masks.split(), *harvest.split()])
    files = ["--vqm", str(folder / "vqm.h5"), "--out", str(folder)]
    options = f"--width 4 --members {members} --epochs 1 --batch 16"
    train_qp.main([data, *files, *options.split()])
    return str(folder / "vqm.h5"), str(folder / "qp.pt")


def shared_quality(factory, name, data, **options):
    folder = shared(factory, name, lambda folder: quality(data, folder, **options))
    return str(folder / "vqm.h5"), str(folder / "qp.pt")


@pytest.fixture(scope="session")
def gray_quality(gray, tmp_path_factory):
    return shared_quality(tmp_path_factory, "gray_quality", gray, members=1)


@pytest.fixture(scope="session")
def volumes_quality(volumes, tmp_path_factory):
    small = dict(size="16,16,32", val=1, epochs="1", members=1, masks=4)
    return shared_quality(tmp_path_factory, "volumes_quality", volumes, **small)


@pytest.fixture(scope="session")
def rgb_quality(rgb, tmp_path_factory):
    return shared_quality(tmp_path_factory, "rgb_quality", rgb)


@pytest.fixture(scope="session")
def rgb_scalar(rgb, rgb_quality, tmp_path_factory):
    """The paper's scalar head. -> qp.pt"""

    def make(folder):
        files = ["--vqm", rgb_quality[0], "--out", str(folder)]
        options = "--head scalar --size 32 --width 8 --epochs 2 --batch 16"
        train_qp.main([rgb, *files, *options.split()])

    return str(shared(tmp_path_factory, "rgb_scalar", make) / "qp.pt")


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are composed, but not rendered, which takes seconds; other tests look at them."""

    def save_figure(figure, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
        figures.pyplot().close(figure)

    monkeypatch.setattr(figures, "save_figure", save_figure)


@pytest.fixture
def refused(capsys):
    """refused(main, argv, *words): the script refuses the arguments.

    It ends with exit code 2 and one line on standard error that holds the words.
    """

    def check(main, argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli(lambda: main([str(a) for a in argv]))
        error = capsys.readouterr().err
        assert end.value.code == 2, error
        assert error.count("\n") == 1 and "Traceback" not in error, error
        for word in words:
            assert word in error, error

    return check


def python(*argv, **kwargs):
    """Runs `python ARGV` in the project's folder, as a user does."""
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, **kwargs
    )
