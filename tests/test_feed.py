"""Where images are kept and how they reach a step.

The same samples from memory, from a device and from the file, whoever reads them.
"""

import multiprocessing
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch

import train_ssl
from data import h5, loading
from models.device import compute

SIZES = {
    "gray": 40,
    "rgb": 32,
    "volumes": (16, 24, 40),
}  # of volumes, one side larger than theirs: they are mirrored there
PICK = (
    torch.tensor([3, 0, 3, 1]),
    torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.9, 0.5], [0.999, 0.999, 0.999], [0.5, 0.1, 0.2]]),
)


def in_memory(info, split, size, *more, **how):
    return (loading.load_slices if info.dims == 2 else loading.load_volumes)(
        info, split, size, *more, **how
    )


def same(a, b):
    return all(
        (u is None and v is None) or (u.dtype == v.dtype and torch.equal(u, v))
        for u, v in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("labels", [True, False])
def test_from_the_file_as_from_memory(kind, labels, request):
    info = h5.read_info(request.getfixturevalue(kind))
    memory, disk = (
        load(info, "train", SIZES[kind], labels=labels) for load in (in_memory, loading.Stored)
    )
    assert len(disk) == len(memory) and disk.case == memory.case
    assert (
        same(disk.fetch(*PICK), memory.fetch(*PICK))
        and (disk.fetch(*PICK)[1] is not None) == labels
    )
    names = [info.entries("train")[2].name, info.entries("train")[0].name]
    few = loading.Stored(info, "train", SIZES[kind], names[:1], labels=labels)
    assert set(few.case) == set(names[:1])
    both, want = (
        a + b
        for a, b in (
            (disk, few),
            (memory, in_memory(info, "train", SIZES[kind], names[:1], labels=labels)),
        )
    )
    last = torch.tensor([len(both) - 1, 0]), PICK[1][:2]
    assert len(both) == len(want) and same(both.fetch(*last), want.fetch(*last))
    held = memory.image if kind != "volumes" else torch.cat([v.flatten() for v in memory.image])
    assert (
        loading.bytes_in_memory(info, "train", SIZES[kind])
        == held.numel() * held.element_size() + held.numel() // info.channels
    )


def test_a_place_says_where_a_patch_is():
    assert loading.part_at((10, 20, 5), (4, 20, 5), torch.tensor([0.0, 0.5, 0.999])) == (
        slice(0, 4),
        slice(0, 20),
        slice(0, 5),
    )
    assert loading.part_at((10, 20, 6), (4, 15, 5), torch.tensor([0.999, 0.5, 0.5])) == (
        slice(6, 10),
        slice(3, 18),
        slice(1, 6),
    )
    firsts = [
        loading.part_at((6, 4, 4), (4, 4, 4), place)[0].start for place in torch.rand(3000, 3)
    ]
    assert np.allclose(
        np.bincount(firsts) / 3000, 1 / 3, atol=0.05
    )  # every place is equally likely


def fetch_there(disk, connection):
    found = [v.numpy() for v in disk.fetch(*PICK)]
    connection.send((found, [pid for pid, _ in disk.files]))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_each_process_opens_the_file_for_itself(start, gray):
    disk = loading.Stored(h5.read_info(gray), "train", 32)
    mine = disk.fetch(*PICK)
    assert len(disk.files) == 1 and pickle.loads(pickle.dumps(disk)).files == {}
    context = multiprocessing.get_context(start)
    here, there = context.Pipe()
    worker = context.Process(target=fetch_there, args=(disk, there))
    worker.start()
    assert here.poll(60)
    found, owners = here.recv()
    assert same([torch.from_numpy(v) for v in found], mine) and owners == [worker.pid]
    worker.join()
    assert worker.exitcode == 0 and same(disk.fetch(*PICK), mine)


def test_only_the_crop_is_read(volumes, gray, monkeypatch):
    read = []
    getitem = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset,
        "__getitem__",
        lambda self, part, **how: read.append(v := getitem(self, part, **how)) or v,
    )
    loading.Stored(h5.read_info(volumes), "train", (8, 16, 16)).fetch(*PICK)
    assert {v.shape for v in read} == {(8, 16, 16)} and len(
        read
    ) == 8  # an image and a label for each of four patches
    read.clear()
    loading.Stored(h5.read_info(gray), "train", 32, labels=False).fetch(*PICK)
    assert {v.shape for v in read} == {(1, 48, 48)} and len(read) == 4


def test_what_the_file_does_not_say_is_measured(gray, tmp_path):
    """Files of before have no mean and deviation."""
    shutil.copy(gray, tmp_path / "old.h5")
    with h5py.File(tmp_path / "old.h5", "a") as f:
        for case in f["train"].values():
            del case.attrs["mean"], case.attrs["std"]
    new, old = (
        loading.Stored(h5.read_info(str(path)), "train", 32).fetch(*PICK)
        for path in (gray, tmp_path / "old.h5")
    )
    assert same(new, old)


def test_bad_pixels_are_found_when_they_are_read(gray, tmp_path, refused):
    shutil.copy(gray, tmp_path / "bad.h5")
    with h5py.File(tmp_path / "bad.h5", "a") as f:
        name = list(f["train"])[0]
        f[f"train/{name}/image"][2, 5, 5] = np.nan
    out = [
        "--out",
        tmp_path / "o",
        "--labeled",
        "1",
        "--size",
        "32",
        "--steps",
        "20",
        "--batch",
        "4",
        "--cache",
        "off",
        "--device",
        "cpu",
    ]
    for workers in ("0", "1"):
        refused(train_ssl.main, [tmp_path / "bad.h5", *out, "--workers", workers], "NaN", name)
    with pytest.raises(h5.InputError, match="no case to read"):
        loading.Stored(h5.read_info(gray), "train", 32, [])
    shutil.copy(gray, tmp_path / "less.h5")
    with h5py.File(tmp_path / "less.h5", "a") as f:
        del f[f"train/{name}/label"]
    with pytest.raises(h5.InputError, match=f"{name} has no label"):
        loading.Stored(h5.read_info(str(tmp_path / "less.h5")), "train", 32)


def feed_of(data, args):
    info = h5.read_info(data)
    train_ssl.set_defaults(args, info)
    return train_ssl.Feed(*train_ssl.load_data(info, args, compute("cpu", "off")), args)


@pytest.mark.parametrize("kind", ["gray", "volumes"])
def test_a_run_is_the_same_wherever_images_are_kept(kind, request, tmp_path):
    """RAM, the device, the file in this process, the file in two workers.

    Bit by bit the same weights.
    """
    data = request.getfixturevalue(kind)
    size = ",".join(map(str, SIZES[kind])) if kind == "volumes" else str(SIZES[kind])
    weights = {}
    for name, how in {
        "ram": ["ram"],
        "device": ["device"],
        "file": ["off", "--workers", "0"],
        "workers": ["off", "--workers", "2"],
    }.items():
        train_ssl.main(
            [
                data,
                "--out",
                str(tmp_path / name),
                "--labeled",
                "2",
                "--method",
                "mean_teacher",
                "--size",
                size,
                "--width",
                "4",
                "--steps",
                "3",
                "--batch",
                "2",
                "--batch-unlabeled",
                "2",
                "--lam-warmup",
                "0",
                "--lam-ramp",
                "0",
                "--window",
                "whole" if kind == "volumes" else "sliding",
                "--device",
                "cpu",
                "--cache",
                *how,
            ]
        )
        weights[name] = torch.load(tmp_path / name / "last.pt", weights_only=True)["nets"][0]
    for name in weights:
        assert all(torch.equal(weights[name][k], v) for k, v in weights["ram"].items()), name


def test_steps_draw_without_repetition_and_each_another(gray):
    args = train_ssl.parse_args(
        [
            gray,
            "--out",
            "o",
            "--labeled",
            "2",
            "--method",
            "mean_teacher",
            "--size",
            "32",
            "--batch",
            "8",
            "--batch-unlabeled",
            "5",
            "--lam-warmup",
            "0.5",
            "--lam-ramp",
            "0",
            "--steps",
            "10",
        ]
    )
    feed = feed_of(gray, args)
    n = len(feed.labeled)
    assert n == 8
    numbers = lambda image: [
        int((feed.labeled.image == one).flatten(1).all(1).nonzero()[0, 0]) for one in image
    ]
    orders = [numbers(feed[step][0][0]) for step in range(1, 5)]
    assert (
        all(sorted(order) == list(range(n)) for order in orders)
        and len(set(map(tuple, orders))) == 4
    )
    assert numbers(feed[1][0][0]) == orders[0]  # in any order of asking
    assert feed[5][1] is None and feed[6][1][0].shape == (5, 1, 32, 32)  # lambda sets in at half
    args.seed = 1
    assert numbers(feed[1][0][0]) != orders[0]
    args.batch = 20  # more than there are: each comes twice or three times
    assert {2, 3} == set(np.bincount(numbers(feed[1][0][0])))


def test_auto_keeps_what_fits(gray, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(h5, "free_memory", lambda: 1000)
    assert train_ssl.where_it_fits(499, cpu) == "ram" and train_ssl.where_it_fits(500, cpu) == "off"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes on one machine
    assert train_ssl.where_it_fits(249, cpu) == "ram" and train_ssl.where_it_fits(250, cpu) == "off"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    cuda = torch.device("cuda")
    assert (
        train_ssl.where_it_fits(249, cuda) == "device"
        and train_ssl.where_it_fits(250, cuda) == "off"
    )
    args = train_ssl.parse_args([gray, "--out", "o", "--labeled", "2", "--size", "32"])
    assert isinstance(feed_of(gray, args).labeled, loading.Stored) and args.cache == "off"
