"""What is different in 3D: patches of volumes, sliding windows, V-Net, and the four stages."""

import csv
import itertools
import json
import shutil

import cv2
import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from medpy.metric import binary
from scipy import ndimage
from test_evaluate import make_run
from test_qp import options_of
from test_ssl import same, train
from torch import nn

import corrupt
import evaluate
import models
import train_qp
import train_ssl
from data import (
    augment,
    h5,
    images,
    loading,
    metrics,
    nifti,
    phantom,
    quality_masks,
    space,
    ssl4mis,
)
from models import checkpoints, device, inference
from models.quality import quality_target, resample

ON = device.compute("cpu", "off")
SIZE = (16, 16, 32)


# ----------------------------------------------------------------------------------------- patches


def random_patches(found, *index):
    """Patches of some Volumes at random places. -> images [B, C, *S], labels [B, *S] or None"""
    fetched = found.fetch(torch.tensor(index), torch.rand(len(index), 3))
    return loading.standardized(fetched, "cpu")


def test_patches_are_cut_from_image_and_label_alike(volumes):
    info = h5.read_info(volumes)
    names = [e.name for e in info.entries("train")]
    found = loading.load_volumes(info, "train", SIZE, names[:2])
    torch.manual_seed(0)
    corners = set()
    for _ in range(40):
        x, y = random_patches(found, 1, 0, 1)
        assert x.shape == (3, 1, *SIZE) and y.shape == (3, *SIZE) and y.dtype == torch.int64
        for i, patch, label in zip((1, 0, 1), x[:, 0], y):
            whole = (found.image[i][0] - found.mean[i]) / found.std[i]
            at = [
                c
                for c in itertools.product(range(5), range(25), range(5))
                if torch.equal(patch[0, 0], whole[c[0], c[1], c[2] : c[2] + 32])
                and torch.equal(patch, whole[tuple(slice(a, a + s) for a, s in zip(c, SIZE))])
            ]
            assert len(at) == 1
            assert torch.equal(
                label, found.label[i][tuple(slice(a, a + s) for a, s in zip(at[0], SIZE))].long()
            )
            corners.add(at[0])
    assert all(
        {c[axis] for c in corners} >= {0, last} for axis, last in enumerate((4, 24, 4))
    )  # every place can come
    bare = loading.load_volumes(info, "train", SIZE, names, labels=False)
    assert random_patches(bare, 0)[1] is None


def test_patches_and_resizing_average_images_and_keep_classes(volumes):
    info = h5.read_info(volumes)
    name = info.entries("train")[0].name
    whole = loading.load_patches(info, "train", SIZE, {name: [(2, 5, 1), (0, 0, 0)]})
    assert whole.at == [(2, 5, 1), (0, 0, 0)]
    half = loading.resize_image(whole.image[0, 0].numpy(), (8, 8, 16))
    blocks = whole.image[0, 0].reshape(8, 2, 8, 2, 16, 2).mean((1, 3, 5))
    assert np.allclose(half, blocks, atol=1e-6)
    half = torch.from_numpy(loading.resize_label(whole.label[0].numpy(), (8, 8, 16)))
    votes = nn.functional.avg_pool3d(
        nn.functional.one_hot(whole.label[0].long(), 4).movedim(-1, 0).float(), 2
    )
    assert (votes.gather(0, half[None].long())[0] == votes.amax(0)).all()  # of most voxels
    assert (
        loading.resize_label(whole.label[0].numpy(), (32, 16, 32))[::2] == whole.label[0].numpy()
    ).all()
    with h5.open_file(volumes) as f:
        image, label = h5.read_case(f, info, "train", name)
    assert (whole.image[0, 0].numpy() == image[2:18, 5:21, 1:33]).all() and (
        whole.label[0].numpy() == label[2:18, 5:21, 1:33]
    ).all()
    x, _ = whole.batch(torch.tensor([0]))
    assert np.allclose(
        x[0, 0].numpy(), (image[2:18, 5:21, 1:33] - image.mean()) / image.std(), atol=1e-4
    )  # by the whole case, as f sees it


def test_intensities_that_are_ready_stay_as_they_are(tmp_path):
    image = np.random.default_rng(0).random((16, 16, 32), np.float32)
    case = lambda split: h5.Case(
        split=split, name=split, image=image, label=np.zeros(image.shape, np.uint8), patient=split
    )
    info = h5.write(
        tmp_path / "ct.h5",
        [case("train"), case("val")],
        name="ct",
        classes=["background", "organ"],
        dims=3,
        channels=1,
        standardize=False,
    )
    x, _ = random_patches(loading.load_volumes(info, "train", SIZE), 0)
    tile, _ = loading.load_samples(info, "train", SIZE).batch(torch.tensor([0]))
    assert torch.equal(x, tile) and torch.equal(tile[0, 0], torch.from_numpy(image))


def test_rotation_is_rigid_on_a_grid_that_is_no_square():
    """A disc stays a disc (beyond it lie mirror images)."""
    y, x = np.mgrid[:40, :96]
    distance = np.hypot(y - 19.5, x - 47.5)
    disc = torch.tensor((distance < 15).astype(np.float32))[None, None]
    torch.manual_seed(0)
    for volume in (disc, disc[:, :, None].expand(1, 1, 4, 40, 96)):
        for _ in range(5):
            moved = (
                augment.move(
                    volume,
                    augment.random_geometry(volume, rotate=90, scale=0, shift=0, flip="none"),
                )
                > 0.5
            )
            on, near = moved[0, 0].reshape(-1, 40, 96)[0].numpy(), distance < 19
            assert distance[on & near].max() < 16.5 and distance[~on & near].min() > 13.5


@pytest.mark.parametrize(
    "size, words",
    [
        ("96,96,96", "takes one side"),
        ("31", "at least 32"),
        ("96,96", "neither one number nor three"),
        ("0", "--size"),
        ("a", "--size"),
    ],
)
def test_sizes_that_slices_refuse(size, words, gray, tmp_path, refused):
    for main, more in ((corrupt.main, []), (train_ssl.main, [])):
        refused(main, [gray, "--out", tmp_path / "o", "--size", size, *more], words)


def test_sizes_of_volumes(volumes, tmp_path, refused):
    info = h5.read_info(volumes)
    assert loading.network_grid(info, None) == (80, 112, 112) and loading.network_grid(
        info, (16,)
    ) == (
        16,
        16,
        16,
    )
    refused(corrupt.main, [volumes, "--out", tmp_path / "o", "--size", "8,32,32"], "at least 16")


def test_a_file_for_3d_holds_volumes_whose_channels_have_names(tmp_path):
    picture = h5.Case(
        split="train", name="a", image=np.zeros((20, 20), np.uint8), label=None, patient="p"
    )
    with pytest.raises(h5.InputError, match="dims=3"):
        h5.write(tmp_path / "f.h5", [picture], name="f", classes=["a", "b"], dims=3, channels=1)
    with pytest.raises(h5.InputError, match="0 channel_names for 3"):
        h5.write(tmp_path / "f.h5", [], name="f", classes=["a", "b"], dims=3, channels=3)


# ---------------------------------------------------------------------------------------- networks


def test_vnet_is_that_of_the_left_atrium_baselines():
    net = models.build("vnet", channels=1, classes=2, dims=3)
    assert models.parameters(net) == pytest.approx(9.45e6, rel=0.005)
    kinds = lambda kind: [m for m in net.modules() if isinstance(m, kind)]
    assert (
        len(kinds(nn.Conv3d)) == 1 + 2 + 3 + 3 + 3 + 4 + 3 + 3 + 2 + 1 + 1
        and len(kinds(nn.ConvTranspose3d)) == 4
    )
    assert [m.p for m in kinds(nn.Dropout3d)] == [0.5] and models.build(
        "vnet", channels=1, classes=2, dims=3, dropout=0.0
    ).drop.p == 0
    with torch.no_grad():
        features = net.encode(torch.zeros(1, 1, 32, 32, 48))
    assert [tuple(f.shape[1:]) for f in features] == [
        (16, 32, 32, 48),
        (32, 16, 16, 24),
        (64, 8, 8, 12),
        (128, 4, 4, 6),
        (256, 2, 2, 3),
    ]


@pytest.mark.parametrize("side", [16, 17, 23, 31])
def test_vnet_takes_any_size(side):
    net = models.build("vnet", channels=1, classes=3, dims=3, width=2).eval()
    assert net(torch.zeros(1, 1, side, 16, side + 3)).shape == (1, 3, side, 16, side + 3)


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_a_fused_network_answers_alike(name):
    net = models.build(name, channels=1, classes=3, dims=3, width=4)
    for _ in range(3):  # running statistics of their own
        net(torch.randn(2, 1, 16, 16, 32) * 3 + 1)
    before = [v.clone() for v in net.state_dict().values()]
    fused, x = device.fused(net), torch.randn(1, 1, 16, 16, 32)
    norms = lambda n: sum(isinstance(m, nn.BatchNorm3d) for m in n.modules())
    assert (
        net.training and norms(fused) == {"vnet": 4, "unet": 0}[name] and norms(net) > 10
    )  # V-Net's transposed convolutions keep theirs
    assert torch.allclose(fused(x), net.eval()(x), atol=1e-4) and all(
        torch.equal(a, b) for a, b in zip(before, net.state_dict().values())
    )


def test_g_fits_beside_vnet():
    for width, size in ((16, 2.1e6), (32, 8.3e6)):
        assert models.parameters(
            models.build("quality", channels=1, classes=2, dims=3, width=width)
        ) == pytest.approx(size, rel=0.01)


def test_resampling_of_patches_averages():
    x = torch.rand(1, 2, 8, 12, 16)
    assert (
        torch.allclose(resample(x, (4, 6, 8)), nn.functional.avg_pool3d(x, 2))
        and resample(x, (8, 12, 16)) is x
    )
    assert resample(x, (16, 24, 32)).shape == (1, 2, 16, 24, 32)


# ----------------------------------------------------------------------------------------- windows


class Near(nn.Module):
    """A network of one 5 x 5 x 5 convolution: what it answers depends on where a window ends."""

    seen = []  # shapes, also of a copy

    def __init__(self, K=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, K, 5, padding=2)
        self.seen.clear()

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return self.conv(x)


def plain_loop(net, x, size, stride, weight):
    """One patch at a time, as the public baselines write it, in double precision."""
    K, total, count = 3, 0, 0
    total, count = np.zeros((K, *x.shape)), np.zeros(x.shape)
    steps = [int(np.ceil((n - s) / t)) + 1 for n, s, t in zip(x.shape, size, stride)]
    for i, j, k in itertools.product(*map(range, steps)):
        at = [min(t * step, n - s) for t, step, n, s in zip(stride, (i, j, k), x.shape, size)]
        part = tuple(slice(a, a + s) for a, s in zip(at, size))
        with torch.no_grad():
            p = net(x[part][None, None]).softmax(1)[0].numpy()
        total[(slice(None), *part)] += p * weight
        count[part] += weight
    return total / count


@pytest.mark.parametrize(
    "shape, size, stride",
    [
        ((24, 40, 36), (16, 16, 32), (8, 8, 16)),
        ((19, 33, 37), (16, 16, 32), (5, 7, 3)),
        ((16, 16, 32), (16, 16, 32), (8, 8, 16)),
        ((60, 16, 32), (16, 16, 32), (16, 16, 32)),
    ],
)
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_sliding_window_equals_a_plain_loop(shape, size, stride, gaussian, batch):
    net, x = Near().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    cut = inference.Window(size, stride, gaussian, batch=batch)
    axes = [
        np.exp(-((np.arange(s) - (s - 1) / 2) ** 2) / 2 / (s / 8) ** 2) if gaussian else np.ones(s)
        for s in size
    ]
    with torch.no_grad():
        slabs = list(inference.sliding_window(net, x[None], cut, ON))
    calls = len(net.seen)
    want = plain_loop(net, x, size, stride, axes[0][:, None, None] * axes[1][:, None] * axes[2])
    assert np.abs(torch.cat(slabs, 1).numpy() - want).max() < 1e-5
    assert all(
        slab.shape[1] <= size[0] for slab in slabs
    )  # the map of scores is never deeper than a window
    assert calls <= -(-(len(net.seen) - calls) // batch) + len(slabs)  # and windows go in batches


class Voxelwise(nn.Module):
    """A perfect network of an image that is its own label."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1) * 20


@pytest.mark.parametrize("shape", [(20, 40, 36), (7, 9, 50), (33, 48, 64)])
@pytest.mark.parametrize("whole", [False, True])
def test_labels_come_back_on_the_grid_of_the_case(shape, whole, tmp_path):
    rng = np.random.default_rng(0)
    cases = []
    for i in range(2):
        label = (ndimage.gaussian_filter(rng.standard_normal(shape), 2) > 0.05).astype(np.uint8)
        cases.append(
            h5.Case(
                split="val",
                name=f"c{i}",
                image=label.astype(np.float32),
                label=label,
                patient=f"p{i}",
                spacing=(3.0, 1.0, 1.0),
            )
        )
    info = h5.write(
        tmp_path / "f.h5",
        cases,
        name="f",
        classes=["background", "a"],
        dims=3,
        channels=1,
        standardize=False,
    )
    found, cut, net = (
        inference.Cases(info, "val", SIZE),
        inference.Window(SIZE, (8, 8, 16), whole=whole),
        Voxelwise().train(),
    )
    for case, (entry, label, truth) in zip(
        cases, inference.predict_cases(net, found, ON, cut), strict=True
    ):
        assert (
            label.dtype == np.uint8
            and (label == case.label).all()
            and (truth == case.label).all()
            and entry.name == case.name
        )
    assert net.training and inference.mean_dice(
        inference.dice_table(net, found, ON, 2, cut), [True]
    ) == (1.0, [1.0])


def test_labels_of_cases_are_those_of_a_plain_loop(volumes):
    info, stride = h5.read_info(volumes), (8, 16, 16)
    net, cut = Near().eval(), inference.Window(SIZE, stride, gaussian=False)
    with h5.open_file(volumes) as f:
        for entry, label, truth in inference.predict_cases(
            net, inference.Cases(info, "val", SIZE), ON, cut
        ):
            image, want = h5.read_case(f, info, "val", entry.name)
            p = plain_loop(
                net,
                torch.from_numpy((image - image.mean()) / image.std()).float(),
                SIZE,
                stride,
                np.ones(SIZE),
            )
            assert (truth == want).all() and (label == p.argmax(0)).mean() > 0.999


def test_whole_window_is_one_pass_over_the_padded_volume(volumes):
    info = h5.read_info(volumes)
    net = Near(4).eval()
    labels = [
        label
        for _, label, _ in inference.predict_cases(
            net, inference.Cases(info, "val", SIZE), ON, inference.Window(SIZE, SIZE, whole=True)
        )
    ]
    assert net.seen == [(1, 1, 32, 48, 48)] * 2 and all(
        label.shape == (20, 40, 36) for label in labels
    )


def test_options_of_windows(volumes):
    args = evaluate.parse_args(["d", "c", "--out", "o"])
    assert (
        inference.window_of(SIZE, args, 2) == inference.Window(SIZE, (8, 8, 16))
        and inference.window_of(96, args) is None
    )
    args = evaluate.parse_args(
        ["d", "c", "--out", "o", "--stride", "4,5,6", "--blend", "uniform", "--window", "whole"]
    )
    assert inference.window_of(SIZE, args, 7) == inference.Window(SIZE, (4, 5, 6), False, True, 7)


def test_strides_that_leave_gaps_and_windows_of_slices_are_refused(
    volumes, gray, tmp_path, refused
):
    out = ["--out", tmp_path / "o"]
    refused(
        train_ssl.main,
        [volumes, *out, "--size", "16,16,32", "--stride", "8,24,16"],
        "--stride 8,24,16",
        "larger than the window",
        "16,16,32",
    )
    refused(train_ssl.main, [volumes, *out, "--stride", "0"], "--stride")
    for option in (["--window", "whole"], ["--stride", "8"], ["--blend", "uniform"]):
        refused(train_ssl.main, [gray, *out, *option], option[0], "dims=3")
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (8.0, 1.4, 1.4), (0.625, 1.25, 2.0)])
def test_scores_of_an_organ_equal_medpy(spacing, monkeypatch):
    """Large smooth bodies, as organs are, are scored by a search tree; noisy ones by a map.

    Both are medpy's numbers.
    """
    grid = np.mgrid[:60, :90, :80]
    ball = lambda c, r: sum(((g - a) / b) ** 2 for g, a, b in zip(grid, c, r)) < 1
    truth, near, far = (
        ball((30, 45, 40), (20, 30, 25)),
        ball((32, 43, 41), (18, 31, 26)),
        ball((12, 12, 14), (8, 9, 11)),
    )
    noisy = truth ^ (np.random.default_rng(0).random(truth.shape) < 0.2)
    trees, original = [], metrics.spatial.cKDTree
    monkeypatch.setattr(metrics.spatial, "cKDTree", lambda *a: trees.append(1) or original(*a))
    for mask, searched in ((near, True), (far, True), (noisy, False)):
        trees.clear()
        ours = metrics.score(mask, truth, spacing)
        assert bool(trees) == searched
        assert ours.hd95 == pytest.approx(binary.hd95(mask, truth, voxelspacing=spacing), abs=1e-9)
        assert ours.asd == pytest.approx(binary.asd(mask, truth, voxelspacing=spacing), abs=1e-9)
        assert ours.dice == pytest.approx(
            binary.dc(mask, truth), abs=1e-12
        ) and ours.jaccard == pytest.approx(binary.jc(mask, truth), abs=1e-12)


# ---------------------------------------------------------------------------------- stages 1 and 2


def read(path):
    with h5py.File(path) as f:
        return {f"{s}/{n}": f[s][n][:] for s in f for n in f[s]}, dict(f.attrs)


def test_masks_of_patches(volumes, tmp_path):
    """The file holds what it says: masks on patches of train at random places, on tiles of val."""
    common = [
        volumes,
        *"--labeled 3 --size 16,16,32 --patches 2 --masks 5 --val-masks 1 --folds 2".split(),
        *"--harvest-share 0.4 --harvest-epochs 1 --harvest-steps 1".split(),
    ]
    for name, more in (
        ("a", ["--preview", str(tmp_path / "p.png")]),
        ("b", ["--seed", "1", "--folds", "1"]),
    ):
        corrupt.main([*common, "--out", str(tmp_path / name), *more])
    (found, attrs), (other, _) = (read(tmp_path / n / "vqm.h5") for n in "ab")
    assert (found["train/mask"] != other["train/mask"]).any()
    assert (found["train/at"] != other["train/at"]).any()
    assert cv2.imread(str(tmp_path / "p.png")).std() > 5
    info, K = h5.read_info(volumes), 4
    assert tuple(attrs["size"]) == SIZE and found["train/mask"].shape == (3 * 2 * 5, *SIZE)
    n_tiles = len(loading.tiles(info.entries("val")[0].grid, SIZE))
    assert len(found["val/mask"]) == 2 * n_tiles and len(found["real/mask"]) == 2 * n_tiles * 2
    with h5.open_file(volumes) as f:
        for split, source in (("train", "train"), ("val", "val"), ("real", "val")):
            for mask, dice, name, at in zip(
                *(found[f"{split}/{n}"] for n in ("mask", "dice", "case", "at"))
            ):
                truth = f[source][name.decode()]["label"][
                    tuple(slice(a, a + s) for a, s in zip(at, SIZE))
                ]
                assert dice == pytest.approx(
                    [metrics.dice(mask == k, truth == k) for k in range(1, K)], abs=1e-6
                )
    assert set(found["train/case"]) == {e.name.encode() for e in info.entries("train")[:3]}
    harvested = found["train/prob_index"] >= 0
    assert harvested.mean() == pytest.approx(0.4) and len(found["train/prob"]) == harvested.sum()


def test_masks_and_patches_stay_together(volumes, volumes_quality):
    """Also on another grid: an identity stays perfect, before and after augmentation."""
    info = h5.read_info(volumes)
    for size in (None, (16, 16, 24)):
        masks = quality_masks.load(volumes_quality[0], "train", info, size, probabilities=True)
        assert masks.patch == SIZE and masks.mask.shape[1:] == (size or SIZE)
        masks.mask[::2] = masks.samples.label[masks.index[::2]]
        rows = torch.arange(len(masks.mask))
        seen, truth = train_qp.augmented_batch(
            masks,
            rows,
            info,
            torch.device("cpu"),
            options_of([volumes, "--vqm", "v", "--out", "o", "--soft", "0"], dims=3),
        )
        x, mask = seen.image, seen.mask
        assert (
            x.shape == (len(rows), 1, *(size or SIZE))
            and (quality_target(mask, truth)[::2] == 1).all()
            and (quality_target(mask, truth)[1::2] < 1).any()
        )
        seen, _ = train_qp.augmented_batch(
            masks,
            rows,
            info,
            torch.device("cpu"),
            options_of([volumes, "--vqm", "v", "--out", "o", "--soft", "1"], dims=3),
        )
        soft = seen.mask
        assert ((soft > 0.01) & (soft < 0.99)).flatten(1).any(1).float().mean() > 0.5


@pytest.mark.usefixtures("unrendered")
def test_it_learns_to_tell_good_from_bad(tmp_path):
    """On bright balls in noise, a tiny g learns to grade masks of others by the image."""
    rng, grid = np.random.default_rng(0), np.mgrid[:16, :20, :20]

    def cases():
        for i in range(14):
            center, radii = (
                rng.uniform(0.42, 0.58, 3) * (16, 20, 20),
                rng.uniform(0.17, 0.33, 3) * (16, 20, 20),
            )
            label = (sum(((g - c) / r) ** 2 for g, c, r in zip(grid, center, radii)) < 1).astype(
                np.uint8
            )
            image = (label + 0.3 * rng.standard_normal(label.shape)).astype(np.float32)
            yield h5.Case(
                split="train" if i < 10 else "val",
                name=f"b{i}",
                image=image,
                label=label,
                patient=f"b{i}",
            )

    data = str(tmp_path / "f.h5")
    h5.write(data, cases(), name="balls", classes=["background", "ball"], dims=3, channels=1)
    corrupt.main(
        [
            data,
            "--out",
            str(tmp_path),
            *"--size 16,20,20 --patches 1 --masks 14 --val-masks 8 --harvest-epochs 1".split(),
            *"--harvest-steps 2 --harvest-share 0.3".split(),
        ]
    )
    train_qp.main(
        [
            data,
            "--vqm",
            str(tmp_path / "vqm.h5"),
            "--out",
            str(tmp_path),
            *"--size 16,16,16 --epochs 3 --batch 8 --per-image 14 --lr 5e-3 --width 4".split(),
            *"--members 1".split(),
        ]
    )
    report = json.loads((tmp_path / "qp.json").read_text())
    synthetic = next(
        r for r in report["rows"] if r["masks"] == "synthetic masks" and r["entries"] == "all"
    )
    assert synthetic["pearson"] > 0.8 and report["image_dependence"]["blank image"] < 0.7


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("head, width", [("dense", "4"), ("scalar", "8")])
def test_g_resumed_equals_uninterrupted(
    head, width, volumes, volumes_quality, tmp_path, monkeypatch
):
    common = [
        volumes,
        "--vqm",
        volumes_quality[0],
        *"--size 16 --batch 8 --epochs 2".split(),
        *("--head", head, "--width", width),
        *"--members 1 --per-image 2".split(),
    ]
    train_qp.main([*common, "--out", str(tmp_path / "whole")])
    step, calls = train_qp.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) > 3:  # in the second epoch
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_qp, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_qp.main([*common, "--out", str(tmp_path / "parts")])
    monkeypatch.setattr(train_qp, "train_step", step)
    train_qp.main([*common, "--out", str(tmp_path / "parts"), "--resume"])
    a, b = (torch.load(tmp_path / n / "qp.pt", weights_only=True) for n in ("whole", "parts"))
    assert (
        all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
        and a["patch"] == SIZE
    )


# ---------------------------------------------------------------------------------- stages 3 and 4


def test_resumed_equals_uninterrupted(volumes, volumes_quality, tmp_path, monkeypatch):
    more = (
        *"--method ua_mt --weight quality --steps 4".split(),
        "--qp",
        volumes_quality[1],
        "--qar",
        0.01,
        "--qar-warmup",
        0,
    )
    whole = train(volumes, tmp_path / "whole", *more)
    step, calls = train_ssl.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_ssl, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(volumes, tmp_path / "parts", *more)
    monkeypatch.setattr(train_ssl, "train_step", step)
    assert same(whole, train(volumes, tmp_path / "parts", *more, "--resume")) and not same(
        whole, train(volumes, tmp_path / "other", *more, "--seed", 1)
    )
    train(
        volumes, tmp_path / "parts", *more, "--stride", "8", "--window", "sliding", "--resume"
    )  # which may change: memory may not suffice


def test_labels_of_unlabeled_volumes_have_no_influence(volumes, tmp_path):
    shutil.copy(volumes, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        del f["test"]
        for name in list(f["train"])[2:4]:
            f[f"train/{name}/label"][...] = 1
        for name in list(f["train"])[4:]:
            del f["train"][name]["label"]
    a, b = (
        train(data, tmp_path / n, *"--method pseudo_label --conf-threshold 0 --steps 2".split())
        for data, n in ((volumes, "a"), (str(tmp_path / "f.h5"), "b"))
    )
    assert same(a, b)


@pytest.mark.usefixtures("unrendered")
def test_volumes_of_a_second_file_and_patches_larger_than_a_volume(volumes, tmp_path, capsys):
    phantom.main(
        [
            "--out",
            str(tmp_path / "flat.h5"),
            *"--train 3 --val 1 --test 0 --depth 5 --size 32 --dims 3".split(),
        ]
    )
    train(
        volumes,
        tmp_path / "a",
        "--method",
        "mean_teacher",
        "--unlabeled",
        str(tmp_path / "flat.h5"),
        "--steps",
        1,
    )
    assert "2 labeled and 7 unlabeled volumes" in capsys.readouterr().out
    more = "--method bcp --size 16,48,32 --steps 2".split()
    state = train(str(tmp_path / "flat.h5"), tmp_path / "b", *more)
    assert state["step"] == 2 and state["args"]["size"] == (16, 48, 32)
    assert "are mirrored" in capsys.readouterr().out
    evaluate.main(
        [
            str(tmp_path / "flat.h5"),
            str(tmp_path / "b" / "best.pt"),
            "--out",
            str(tmp_path / "t"),
            "--pictures",
            "1",
        ]
    )


def test_network_options_reach_the_network_and_its_checkpoint(volumes, tmp_path, refused):
    config = train(volumes, tmp_path / "a", "--dropout", 0.1, "--steps", 1)["model"]
    assert config == dict(name="vnet", channels=1, classes=4, dims=3, width=2, dropout=0.1)
    state = train(volumes, tmp_path / "b", "--model", "unet", "--steps", 1)
    assert state["model"]["name"] == "unet"
    refused(
        train_ssl.main,
        [volumes, "--out", tmp_path / "o", "--model", "unet", "--dropout", "0.1"],
        "--dropout",
        "vnet",
    )


@pytest.mark.usefixtures("unrendered")
def test_all_four_stages_and_the_table(volumes, volumes_quality, tmp_path, capsys):
    runs = []
    for i, more in enumerate(
        (
            (),
            ("--method", "mean_teacher", "--weight", "quality", "--qp", volumes_quality[1]),
        )
    ):
        train(volumes, tmp_path / str(i), *more, "--steps", 2)
        runs.append(str(tmp_path / str(i) / "best.pt"))
    for split in ("val", "held_out"):
        evaluate.main(
            [
                volumes,
                *runs,
                "--out",
                str(tmp_path / split),
                "--qp",
                volumes_quality[1],
                "--split",
                split,
                "--pictures",
                "1" if split == "val" else "0",
                "--window",
                "sliding" if split == "val" else "whole",
                "--amp",
                "off",
            ]
        )
    text = capsys.readouterr().out
    assert (
        "| supervised | 2 |" in text
        and "| mean_teacher + QW (pixel) | 2 |" in text
        and "HD95 mm" in text
        and "of each patch and class that is present" in text
    )
    cases = list(csv.DictReader(open(tmp_path / "val" / "cases.csv")))
    assert len(cases) == 2 * 2 * 3 and {c["unit"] for c in cases} == {"mm"}
    info = h5.read_info(volumes)
    rows = list(csv.DictReader(open(tmp_path / "held_out" / "quality.csv")))
    assert (
        len(rows) == 2 * 2 * len(loading.tiles((20, 40, 36), SIZE)) * 3
        and rows[0]["patch"] == "0 0 0"
    )  # g has seen 4 of 6 patients
    net, _ = checkpoints.load_run(runs[0], "student", ON)
    _, label, truth = next(
        inference.predict_cases(
            net, inference.Cases(info, "val", SIZE), ON, inference.Window(SIZE, (8, 8, 16))
        )
    )
    with h5.open_file(volumes) as f:
        assert (truth == h5.read_case(f, info, "val", "phantom006")[1]).all()
    assert (
        "windows of 16 x 16 x 32, stride 8 x 8 x 16"
        in (tmp_path / "val" / "summary.md").read_text()
    )
    row = next(
        c
        for c in cases
        if (c["checkpoint"], c["case"], c["class"]) == (runs[0], "phantom006", "right ventricle")
    )
    ours = metrics.score(label == 1, truth == 1, info.entries("val")[0].spacing)
    assert float(row["dice"]) == pytest.approx(ours.dice) and float(row["hd95"]) == pytest.approx(
        ours.hd95
    )


def test_refusals(volumes, gray, volumes_quality, gray_quality, tmp_path, refused):
    out = ["--out", tmp_path / "o"]
    refused(
        train_ssl.main,
        [volumes, *out, "--size", "16,32,32", "--qar", "0.1", "--qp", volumes_quality[1]],
        "16,16,32",
        "16,32,32",
        "--size",
    )
    refused(
        train_ssl.main,
        [volumes, *out, "--size", "16", "--qar", "0.1", "--qp", gray_quality[1]],
        "dims",
    )
    refused(train_ssl.main, [volumes, *out, "--size", "16,16,32", "--unlabeled", gray], "dims")
    refused(train_ssl.main, [volumes, *out, "--stride", "1,2"], "--stride")
    shutil.copy(volumes, tmp_path / "flat.h5")
    with h5py.File(tmp_path / "flat.h5", "a") as f:
        f.attrs["dims"] = 2
    refused(train_qp.main, [tmp_path / "flat.h5", "--vqm", volumes_quality[0], *out], "3D", "2D")
    train(volumes, tmp_path / "run", "--steps", 1)
    refused(evaluate.main, [tmp_path / "flat.h5", tmp_path / "run" / "best.pt", *out], "dims")
    refused(
        evaluate.main,
        [volumes, tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt", "--predict", *out],
        "--predict",
        "one checkpoint",
    )
    with h5py.File(tmp_path / "flat.h5", "a") as f:
        f.attrs["dims"], f.attrs["standardize"] = 3, False
    refused(
        evaluate.main, [tmp_path / "flat.h5", tmp_path / "run" / "best.pt", *out], "standardize"
    )
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------- masks of new images


def test_predicted_masks_lie_on_the_grid_of_their_source(tmp_path):
    """NIfTI -> HDF5, resampled -> network -> NIfTI with the source's grid, origin and directions.

    A perfect network gives the source's label.
    """
    rng, turn = (
        np.random.default_rng(0),
        np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]),
    )
    for split in ("Tr", "Ts"):
        for i in range(2 if split == "Tr" else 1):
            label = (
                ndimage.gaussian_filter(rng.standard_normal((9, 40, 44)), (1, 4, 4)) > 0.02
            ).astype(np.uint8)
            for kind, array in (("images", label.astype(np.float32)), ("labels", label)):
                volume = sitk.GetImageFromArray(array)
                (
                    volume.SetSpacing((1.4, 1.4, 8.0)),
                    volume.SetOrigin((-31.0, 12.5, 7.0)),
                    volume.SetDirection(turn.ravel().tolist()),
                )
                (tmp_path / "src" / f"{kind}{split}").mkdir(parents=True, exist_ok=True)
                if (kind, split) != ("labels", "Ts"):
                    sitk.WriteImage(
                        volume, str(tmp_path / "src" / f"{kind}{split}" / f"c{split}{i}.nii.gz")
                    )
    data = str(tmp_path / "f.h5")
    nifti.main(
        [
            str(tmp_path / "src"),
            "--out",
            data,
            *"--val 0.5 --spacing 8,1.2,1.2 --intensity ct --clip 0,1".split(),
        ]
    )
    run = make_run(tmp_path / "run", h5.read_info(data), size=SIZE)
    network = Voxelwise()
    evaluate_run = checkpoints.load_run
    try:
        checkpoints.load_run = lambda path, weights, on: (
            Scaled(network),
            evaluate_run(path, weights, on)[1],
        )
        evaluate.main([data, run, "--predict", "--split", "test", "--out", str(tmp_path / "out")])
    finally:
        checkpoints.load_run = evaluate_run
    mask = sitk.ReadImage(str(tmp_path / "out" / "masks" / "cTs0.nii.gz"))
    source = sitk.ReadImage(str(tmp_path / "src" / "imagesTs" / "cTs0.nii.gz"))
    assert mask.GetSize() == source.GetSize()
    for what in ("Spacing", "Origin", "Direction"):
        assert np.allclose(
            getattr(mask, f"Get{what}")(), getattr(source, f"Get{what}")(), atol=1e-5
        ), what
    assert (
        metrics.dice(sitk.GetArrayFromImage(mask) > 0, sitk.GetArrayFromImage(source) > 0.5) > 0.9
    )


class Scaled(nn.Module):
    """Of the window's [-1, 1] back to [0, 1]."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x + 1) / 2)


@pytest.mark.parametrize("kind", ["gray", "rgb"])
def test_predicted_masks_of_slices_and_pictures(kind, request, tmp_path):
    """A volume that is segmented slice by slice becomes NIfTI, a picture a PNG.

    data.images reads the PNG again. Labels are not needed.
    """
    shutil.copy(request.getfixturevalue(kind), tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        for case in f["val"].values():
            del case["label"]
    info = h5.read_info(str(tmp_path / "f.h5"))
    run = make_run(tmp_path / "run", info)
    evaluate.main([info.path, run, "--predict", "--out", str(tmp_path / "out")])
    net, _ = checkpoints.load_run(run, "student", ON)
    for entry, label, truth in inference.predict_cases(net, inference.Cases(info, "val", 32), ON):
        path = tmp_path / "out" / "masks" / f"{entry.name}.{'nii.gz' if kind == 'gray' else 'png'}"
        mask = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            if kind == "gray"
            else images.read_mask(path, info.classes)[None]
        )
        assert truth is None and mask.shape == label.shape and (mask == label).mean() > 0.999


# -------------------------------------------------------------------------------------------- data


def make_la(folder, shape=(24, 20, 18)):
    rng = np.random.default_rng(0)
    for i, split in enumerate(("train", "train", "train", "val")):
        (folder / "set" / f"ID{i}").mkdir(parents=True)
        with h5py.File(folder / "set" / f"ID{i}" / "mri_norm2.h5", "w") as f:
            f["image"], f["label"] = (
                rng.standard_normal(shape).astype(np.float32),
                (rng.random(shape) < 0.3).astype(np.uint8) * 255,
            )
        with open(folder / f"{split}.list", "a") as f:
            f.write(f"ID{i}\n")
    return folder


def test_left_atrium_layout(tmp_path, capsys, refused):
    src = make_la(tmp_path / "src")
    ssl4mis.main([str(src), "--out", str(tmp_path / "a.h5"), "--spacing", "1,0.5,0.25"])
    ssl4mis.main(
        [str(src), "--out", str(tmp_path / "b.h5"), "--spacing", "1,0.5,0.25", "--shrink", "2"]
    )
    a, b = (h5.read_info(tmp_path / n) for n in ("a.h5", "b.h5"))
    assert a.dims == 3 and [e.name for e in a.entries("train")] == ["ID0", "ID1", "ID2"]
    assert (a.entries("val")[0].grid, a.entries("val")[0].spacing) == (
        (18, 20, 24),
        (1.0, 0.5, 0.25),
    )
    small = b.entries("val")[0]
    assert (small.grid, small.spacing) == ((9, 10, 12), (2.0, 1.0, 0.5))
    assert (small.source_grid, small.source_spacing) == ((18, 20, 24), (1.0, 0.5, 0.25))
    assert a.entries("val")[0].source_grid is None
    assert [i.prepared for i in (a, b)] == [{"from": "ssl4mis", "shrink": n} for n in (1, 2)]
    with (
        h5.open_file(a.path) as f,
        h5.open_file(b.path) as g,
        h5py.File(src / "set" / "ID3" / "mri_norm2.h5") as source,
    ):
        whole, small = f["val/ID3/image"][:], g["val/ID3/image"][:]
        assert (whole == source["image"][:].transpose(2, 1, 0)).all() and (
            f["val/ID3/label"][:] == (source["label"][:] > 0).transpose(2, 1, 0)
        ).all()
        assert np.allclose(small, whole.reshape(9, 2, 10, 2, 12, 2).mean((1, 3, 5)), atol=1e-6)
        assert (
            g["val/ID3/label"][:]
            == (f["val/ID3/label"][:].reshape(9, 2, 10, 2, 12, 2).mean((1, 3, 5)) > 0.5)
        ).all()
    (src / "val.list").rename(src / "test.list")  # as it is published: train and test
    ssl4mis.main([str(src), "--out", str(tmp_path / "c.h5"), "--val", "1"])
    assert {
        s: [e.name for e in es] for s, es in h5.read_info(tmp_path / "c.h5").splits.items()
    } == {"train": ["ID0", "ID1"], "val": ["ID2"], "test": ["ID3"]}
    assert "the last 1 of train.list validate" in capsys.readouterr().out
    refused(
        ssl4mis.main, [src, "--out", tmp_path / "d.h5"], "--val 8", "has only 3 volumes; give fewer"
    )
    from test_data import make_ssl4mis

    refused(
        ssl4mis.main,
        [make_ssl4mis(tmp_path / "acdc"), "--out", tmp_path / "c.h5", "--shrink", "2"],
        "--shrink",
    )


@pytest.mark.parametrize("known", [[], ["--spacing", "1,1,2"]])
def test_shrunk_volumes_are_scored_on_the_grid_of_their_source(known, tmp_path, capsys):
    src, shape = make_la(tmp_path / "src", (64, 32, 48)), (48, 32, 64)
    cubes = np.kron(np.random.default_rng(1).random((24, 16, 32)) < 0.3, np.ones((2, 2, 2)))
    for path in src.rglob("*.h5"):
        with h5py.File(path, "a") as f:  # what --shrink 2 keeps whole
            f["image"][:] = f["label"][:] = cubes.transpose(2, 1, 0)
    paths = [str(tmp_path / name) for name in ("whole.h5", "small.h5")]
    for path, shrink in zip(paths, ("1", "2")):
        ssl4mis.main([str(src), "--out", path, "--shrink", shrink, *known])
    whole, small = map(h5.read_info, paths)
    entry = small.entries("val")[0]
    with h5.open_file(small.path) as f:
        label = h5.read_label(f, small, "val", entry.name)
    assert (h5.read_source_label(small, "val", entry) == cubes).all()
    assert entry.source_grid == shape and (space.to_source(label, entry) == cubes).all()

    run = make_run(tmp_path / "run", small, size=(16, 16, 16))
    capsys.readouterr()
    score = lambda data, *more: (
        evaluate.main([data, run, "--out", str(tmp_path / "o"), "--pictures", "0", *more]),
        capsys.readouterr().out,
    )[1]
    told = score(small.path)
    assert "1 of the cases are scored on the resampled grid" in told and "note" not in told
    assert "scored on the sources' own grids" in score(small.path, "--grid", "source")
    told = score(whole.path, "--grid", "source")
    assert "no source is known to have another grid (--grid source)" in told
    words = ["shrink 2", "shrink 1"]
    if known:
        words = ["shrink 2, voxels of 2 x 2 x 4 mm", "shrink 1, voxels of 1 x 1 x 2 mm"]
    assert f"{words[0]} for {run}, but {words[1]} for {whole.path}" in told


def test_new_volumes_of_a_run_on_shrunk_ones_are_noted(tmp_path, capsys):
    from test_nifti import make

    ssl4mis.main([str(make_la(tmp_path / "la")), "--out", str(tmp_path / "f.h5"), "--shrink", "2"])
    run = make_run(tmp_path / "run", h5.read_info(str(tmp_path / "f.h5")), size=(16, 16, 16))
    new = make(tmp_path / "new", ["a"], shape=(20, 24, 22)) / "imagesTr"
    evaluate.main([str(new), run, "--predict", "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert f"note: {new}: the network has learned from volumes of --shrink 2" in told
    assert "prepared differently" not in told and (tmp_path / "out/masks/a.nii.gz").exists()


def test_phantoms_of_any_depth_span_the_same_body(tmp_path):
    for depth in (8, 32):
        phantom.main(
            [
                "--out",
                str(tmp_path / f"{depth}.h5"),
                *"--train 1 --val 1 --test 0".split(),
                "--depth",
                str(depth),
                *"--size 48 --dims 3".split(),
            ]
        )
    thick, thin = (h5.read_info(tmp_path / f"{d}.h5").entries("train")[0] for d in (8, 32))
    assert thick.spacing == (8.0, 1.5, 1.5) and thin.spacing == (2.0, 1.5, 1.5)
