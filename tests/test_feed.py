"""Where images are kept and how they reach a step.

The same samples from memory, from a device and from the file, whoever reads them.
"""

import atexit
import multiprocessing
import pickle
import shutil
import signal

import h5py
import numpy as np
import pytest
import torch

import corrupt
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


def test_no_reader_outlives_its_script(gray, monkeypatch):
    """Even if something holds the steps when the script ends, as a traceback does."""
    others, at_exit = multiprocessing.active_children(), []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    options = "--out o --labeled 2 --size 32 --batch 2 --cache off --workers 2".split()
    args = train_ssl.parse_args([gray, *options])
    feed = feed_of(gray, args)
    steps = iter(train_ssl.read_steps(feed.labeled, None, args, 0, compute("cpu", "off")))
    next(steps)
    usual = signal.getsignal(signal.SIGCHLD)
    readers = set(multiprocessing.active_children()) - set(others)
    assert len(readers) == 2
    monkeypatch.setattr(multiprocessing, "active_children", lambda: readers)
    for end in at_exit:
        end()
    for reader in readers:
        reader.terminate()  # as multiprocessing does, and waits
        reader.join(5)
        assert reader.exitcode == -signal.SIGKILL
    del steps
    signal.signal(signal.SIGCHLD, usual)


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


# ------------------------------------------------------------------------ patches that hold targets

GRID = (16, 16, 20)  # of a patch; volume b is smaller


@pytest.fixture
def rare(tmp_path):
    """a: a large class, and one of three voxels; b: the large one; c: none; d: a, unlabeled."""
    label = np.zeros((20, 40, 48), np.uint8)
    label[4:16, 5:25, 8:30] = 1
    label[17:, 36, 44] = 2
    labels = dict(a=label, b=label[:, :14, :30] % 2, c=label * 0, d=label, v=label)
    rng = np.random.default_rng(0)
    cases = (
        h5.Case(
            split="val" if name == "v" else "train",
            name=name,
            image=rng.random(truth.shape, np.float32),
            label=truth,
            patient=name,
        )
        for name, truth in labels.items()
    )
    about = dict(name="rare", classes=["background", "large", "rare"], dims=3, channels=1)
    h5.write(tmp_path / "rare.h5", cases, **about)
    return str(tmp_path / "rare.h5")


def rare_feed(data, share, *more):
    options = (
        "--out o --labeled 3 --method mean_teacher --size 16,16,20 --lam-warmup 0 --lam-ramp 0"
    )
    rest = "--batch 3 --batch-unlabeled 3 --width 2".split()
    share = [] if share is None else ["--foreground", str(share)]
    return feed_of(data, train_ssl.parse_args([data, *options.split(), *rest, *share, *more]))


def labels_of(feed, count=60):
    """Whether labeled patches of the first steps hold each class; fair. -> [n, 3], [n]"""
    items = [feed[step] for step in range(1, count + 1)]
    patches = torch.cat([labeled.label for labeled, _, _ in items])
    held = torch.stack([(patches == k).flatten(1).any(1) for k in (0, 1, 2)], 1)
    return held, torch.cat([fair for *_, fair in items])


def test_a_share_of_the_patches_hold_targets_of_any_class(rare):
    held, fair = labels_of(rare_feed(rare, 1))  # each case comes once in each step
    aimed = fair == 0
    assert aimed.sum() == 2 * 60 and held[aimed, 1:].any(1).all()  # c has no target
    assert 20 <= held[:, 2].sum() <= 40  # of a's 60, half go to the class of three voxels
    _, fair = labels_of(rare_feed(rare, None))
    assert fair.unique().tolist() == [0, 1.5] and 25 <= (fair == 0).sum() <= 55  # 1/3 of 120
    held, fair = labels_of(rare_feed(rare, 0))
    assert (fair == 1).all() and held[:, 2].sum() < 10


def test_a_patch_is_centered_on_its_target(rare):
    places = loading.target_places(h5.read_info(rare), "train", GRID, ["a", "b", "c"])
    assert [[len(one) for one in classes] for classes in places.values()] == [[2000, 3], [2000], []]
    for place in places["a"][1]:
        part = loading.part_at((20, 40, 48), GRID, torch.from_numpy(place))
        assert part == (slice(4, 20), slice(24, 40), slice(28, 48))  # as far as the volume reaches
    label = loading.load_volumes(h5.read_info(rare), "train", GRID, ["a"]).label[0]
    for place in places["a"][0][::50]:
        z, y, x = loading.part_at(label.shape, GRID, torch.from_numpy(place))
        assert label[z.start + 8, y.start + 8, x.start + 10] == 1 or 0 in (
            z.start,
            y.start,
            x.start,
        )


def test_the_share_of_foreground_is_that_of_random_places(rare):
    """Else f would be warned of pseudo-labels that hold less than aimed labels do."""
    found = {}
    info = h5.read_info(rare)
    args = train_ssl.parse_args([rare, "--out", "o", "--strength", "0"])
    for share in (0, 0.5, 1):
        feed = rare_feed(rare, share)
        shares = []
        for step in range(1, 201):
            labeled, _, fair = feed[step]
            batch = train_ssl.views((labeled, None, fair), info, args, torch.device("cpu"))
            shares.append(train_ssl.foreground_share([batch.y], "cpu", batch.at_random).item())
        found[share] = np.mean(shares)
    assert found[0.5] == pytest.approx(found[0], rel=0.1) and found[1] == 0


def test_without_foreground_all_is_as_before_and_unlabeled_patches_stay(rare):
    none, some = rare_feed(rare, 0), rare_feed(rare, 0.7)
    moved = 0
    for step in range(1, 9):
        generator = torch.Generator().manual_seed(train_ssl.seed_of(0, step, 0))
        order = torch.randperm(3, generator=generator)
        want = none.labeled.fetch(order, torch.rand(3, 3, generator=generator))
        labeled, unlabeled, _ = none[step]
        assert same(labeled, want)
        also, others, _ = some[step]
        assert same(unlabeled, others)
        moved += not same(labeled, also)
    assert moved > 4


def test_targets_are_the_same_from_the_file_and_for_two_processes(rare):
    ram, off = (rare_feed(rare, 0.7, "--cache", cache) for cache in ("ram", "off"))
    for step in (3, 1, 2):  # whatever was drawn before
        (labeled, others, fair), again = ram[step], off[step]
        assert same(labeled, again[0]) and same(others, again[1]) and torch.equal(fair, again[2])
        off.world = 2
        parts = []
        for off.rank in (0, 1):
            parts.append(off[step])
        off.rank, off.world = 0, 1
        for r, (mine, _, its) in enumerate(parts):
            assert same(mine, [v[r::2] for v in labeled]) and torch.equal(its, fair[r::2])


@pytest.mark.parametrize("cache", ["ram", "off"])
def test_the_index_is_built_once_of_labeled_cases_alone(cache, rare, monkeypatch):
    read = []
    getitem = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset,
        "__getitem__",
        lambda self, part, **how: read.append(self.name) or getitem(self, part, **how),
    )
    feed = rare_feed(rare, 1, "--cache", cache)
    assert set(feed.labeled.targets) == set("abc")
    called = lambda *_: pytest.fail("the index is built anew")
    monkeypatch.setattr(loading, "target_places", called)
    feed[1], feed[2]
    assert "/train/d/image" in read and "/train/d/label" not in read


@pytest.mark.parametrize("script", [train_ssl, corrupt])
def test_shares_that_are_refused(script, rare, gray, tmp_path, refused):
    for share in ("-0.1", "1.5", "nan", "many"):
        refused(script.main, [rare, "--out", tmp_path / "o", "--foreground", share], "--foreground")
    refused(script.main, [gray, "--out", tmp_path / "o", "--foreground", "0.5"], "is for volumes")


def test_g_sees_targets_too(rare):
    """All patches of labeled train volumes that masks are made of."""
    info = h5.read_info(rare)
    labels = {}
    for share in ("0", "1"):
        options = ["--labeled", "3", "--size", "16,16,20", "--patches", "12", "--foreground", share]
        args = corrupt.parse_args([rare, "--out", "o", *options])
        corrupt.set_defaults(args, info)
        labels[share] = corrupt.load_labeled(info, list("abc"), ["v"], args).train
    a = [np.array(one.case) == "a" for one in labels.values()]
    held = [(one.label[mine] == 2).any(-1).any(-1).any(-1) for one, mine in zip(labels.values(), a)]
    assert not held[0].all() and held[1].any()
    assert (labels["1"].label[a[1]] > 0).any(-1).any(-1).any(-1).all()
    rng = np.random.default_rng([0, 2, 0])
    corners = loading.random_corners((20, 40, 48), GRID, 12, rng)
    assert [at for at, mine in zip(labels["0"].at, a[0]) if mine] == corners
