"""Two processes of torchrun train what one does.

The same step on the joined batch, the same validation, one set of files, resumable.
"""

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FakeG, shared
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import models  # noqa: E402
import train_qp  # noqa: E402
import train_ssl  # noqa: E402
from data import h5, supervision  # noqa: E402
from models import checkpoints, distributed, inference  # noqa: E402
from models.device import compute  # noqa: E402
from models.losses import one_hot  # noqa: E402
from models.quality import Seen  # noqa: E402

ON = compute("cpu", "off")
STEPS = {
    "supervised": ("supervised", 2, "none"),
    "teacher": ("mean_teacher", 2, "quality"),
    "two students": ("cps", 2, "quality"),
    "volumes": ("mean_teacher", 3, "quality"),
}  # method, dims, weight


def likes_bright(seen):
    """Answers of a g that likes bright images, and some not at all.

    So weights differ between samples and processes.
    """
    q = (seen.image.flatten(1).mean(1, keepdim=True) * 3).sigmoid() + 0 * seen.mask.mean()
    return q * (0.7 + 0.3 * seen.mask.flatten(2).mean(2)) * (q > 0.5)


def trained(name, rank=0, world=1):
    """Weights and log of three steps without dropout on batches of 4 + 4.

    This process sees its share of them.
    """
    method, dims, weight = STEPS[name]
    torch.manual_seed(0)
    options = dict(dropouts=(0,) * 5) if dims == 2 else dict()
    nets = [
        distributed.synced(
            models.build(
                "unet", channels=1, classes=3, dims=dims, width=4, **({} if dims == 3 else options)
            )
        )
        for _ in range(train_ssl.STUDENTS.get(method, 1))
    ]
    for layer in (m for net in nets for m in net.modules() if isinstance(m, nn.Dropout)):
        layer.p = 0.0
    teacher = copy.deepcopy(nets[0]).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(
        [p for net in nets for p in net.parameters()], 0.05, momentum=0.9, fused=True
    )
    args = train_ssl.parse_args(
        [
            "d",
            "--out",
            "o",
            "--method",
            method,
            "--weight",
            weight,
            *"--weight-level image --qp g --lam 1 --lam-warmup 0 --lam-ramp 0".split(),
            *"--weight-threshold 0.2 --qar 0.5 --qar-share 1 --qar-warmup 0 --qar-ramp 0".split(),
            *"--steps 3".split(),
        ]
    )
    run, S, parts = (
        train_ssl.Run(nets, teacher, FakeG(likes_bright), optimizer, ON.scaler(), ON),
        (32,) * dims if dims == 2 else (16, 16, 16),
        [],
    )
    for step in range(1, 4):
        torch.manual_seed(step)
        x, u, s1, s2 = (
            torch.randn(4, 1, *S)
            + torch.tensor([1.0, -1.0, 0.3, -0.2]).reshape(-1, *[1] * (dims + 1))
            for _ in range(4)
        )
        y = one_hot(torch.randint(3, (4, *S)), 3)
        parts.append(
            distributed.mean(
                train_ssl.train_step(
                    run, train_ssl.Batch(*(v[rank::world] for v in (x, y, u, s1, s2))), args, step
                )
            )
        )
    return dict(
        nets=[net.state_dict() for net in nets],
        teacher=teacher.state_dict(),
        parts=torch.stack(parts),
    )


def options(data, out, *more):
    return [
        data,
        "--out",
        str(out),
        *"--labeled 4 --method mean_teacher --size 32 --width 4 --steps 4 --eval-every 2".split(),
        *"--batch 4 --batch-unlabeled 4 --lam-warmup 0 --lam-ramp 0 --lr 1e-3 --device cpu".split(),
        *more,
    ]


def work(folder, data, vqm):
    """What each process of the one torchrun does that all tests here look at."""
    torch.set_num_threads(1)
    distributed.start(ON.device)
    rank = distributed.rank()
    torch.save(
        {name: trained(name, rank, distributed.world()) for name in STEPS},
        f"{folder}/steps_{rank}.pt",
    )
    gathered = [distributed.gather(list(range(n))[rank::2]) for n in (0, 1, 5)]
    torch.save(dict(gathered=gathered, world=distributed.world()), f"{folder}/gathered_{rank}.pt")

    train_ssl.main(options(data, f"{folder}/whole"))
    step = train_ssl.train_step

    def dying(run, batch, args, n):
        if n == 4:
            raise KeyboardInterrupt
        return step(run, batch, args, n)

    train_ssl.train_step = dying
    try:
        train_ssl.main(options(data, f"{folder}/parts"))
    except KeyboardInterrupt:
        pass
    train_ssl.train_step = step
    train_ssl.main(options(data, f"{folder}/parts", "--resume"))
    train_ssl.main(options(data, f"{folder}/parts"))  # finished: says so on both, and ends
    dice, found = train_ssl.val_dice, []
    train_ssl.val_dice = lambda *more: found.append(dice(*more)[0]) or dice(*more)
    qp = str(Path(vqm).with_name("qp.pt"))
    train_ssl.main(options(data, f"{folder}/correct", "--correct", "--qp", qp))
    torch.save(found, f"{folder}/dice_{rank}.pt")
    train_ssl.val_dice = dice
    step, runs = train_qp.train_step, []
    train_qp.train_step = lambda run, *more: runs.append(run) or step(run, *more)
    train_qp.main(
        [
            data,
            "--vqm",
            vqm,
            "--out",
            f"{folder}/qp",
            *"--width 4 --members 1 --epochs 1 --batch 16 --per-image 2 --device cpu".split(),
        ]
    )
    torch.save(runs[-1].net.state_dict(), f"{folder}/qp_{rank}.pt")
    try:
        train_ssl.main(options(data, f"{folder}/odd", "--batch", "5"))
    except train_ssl.InputError as error:
        Path(folder, f"odd_{rank}.txt").write_text(str(error))


@pytest.fixture(scope="session")
def two(gray, gray_quality, tmp_path_factory):
    """The folder in which two processes have done work()."""

    def make(folder):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                __file__,
                str(folder),
                gray,
                gray_quality[0],
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "out.txt").write_text(done.stdout)

    return shared(tmp_path_factory, "two", make)


def close(a, b, atol):
    return all(torch.allclose(a[k].float(), b[k].float(), atol=atol, rtol=0) for k in b)


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_step_like_one_on_the_joined_batch(name, two):
    """Weights, batch norm, teacher and log: equal to 1e-5, and identical in both processes."""
    alone, found = (
        trained(name),
        [torch.load(two / f"steps_{rank}.pt", weights_only=True)[name] for rank in (0, 1)],
    )
    for mine, theirs, other in zip(
        [*alone["nets"], alone["teacher"]],
        *([*f["nets"], f["teacher"]] for f in found),
        strict=True,
    ):
        assert close(mine, theirs, 1e-5)
        assert all(torch.equal(theirs[k], other[k]) for k in theirs)
    seen = slice(0, 4)  # loss, supervised, unlabeled, QAR
    assert torch.allclose(alone["parts"][:, seen], found[0]["parts"][:, seen], atol=1e-5)
    assert name == "supervised" or (alone["parts"][:, 2:4] > 1e-3).all()


def test_lists_come_together_in_order(two):
    for rank in (0, 1):
        found = torch.load(two / f"gathered_{rank}.pt", weights_only=True)
        assert found["gathered"] == [[], [0], [0, 1, 2, 3, 4]] and found["world"] == 2


def test_validation_is_that_of_a_single_process(two, gray):
    """The Dice in the log, of cases that two processes shared, is what one finds."""
    row = list(csv.DictReader(open(two / "whole" / "log.csv")))[-1]
    net, _ = checkpoints.load_run(str(two / "whole" / "last.pt"), "student", ON)
    info = h5.read_info(gray)
    mean, per_class = inference.mean_dice(
        inference.dice_table(net, inference.Cases(info, "val", 32), ON, 4),
        supervision.held_classes(info, "val"),
    )
    assert float(row["val_dice"]) == pytest.approx(mean, abs=1e-5)
    assert [float(row[f"val_{c}"]) for c in info.classes[1:]] == pytest.approx(per_class, abs=1e-5)


def test_resumed_by_two_equals_uninterrupted(two):
    whole, parts = (
        torch.load(two / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    for a, b in zip([*whole["nets"], whole["teacher"]], [*parts["nets"], parts["teacher"]]):
        assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [list(csv.DictReader(open(two / name / "log.csv"))) for name in ("whole", "parts")]
    assert [r["step"] for r in rows[0]] == ["2", "4"] and [r | {"ms": 0} for r in rows[0]] == [
        r | {"ms": 0} for r in rows[1]
    ]


def test_two_processes_trust_g_alike(two):
    """Each looks at its own val cases; both know the Dice of f, and of both shares, of all."""
    first, second = (torch.load(two / f"dice_{rank}.pt") for rank in (0, 1))
    assert first == second and len(first) == 2 * 3
    state = torch.load(two / "correct" / "last.pt", weights_only=True)
    assert state["trust"] == (0.0, 0.5, 1.0)[first[3:].index(max(first[3:]))]


def test_one_process_writes_and_speaks(two):
    said = (two / "out.txt").read_text()
    assert (
        said.count("\n       2  ") == 3
        and said.count("2 processes") == 5
        and said.count("is finished") == 1
    )  # whole, parts, parts again, correct, g
    assert len(list((two / "whole").glob("events.*"))) == 1 and (two / "qp" / "qp.md").is_file()
    for rank in (0, 1):
        assert (
            "--batch 5: cannot be shared evenly by 2 processes"
            in (two / f"odd_{rank}.txt").read_text()
        )
    assert not list((two / "odd").glob("*"))


def test_g_trained_by_two_is_a_g(two, gray):
    info = h5.read_info(gray)
    g, labeled = checkpoints.load_quality(str(two / "qp" / "qp.pt"), info, ON)
    seen = Seen(torch.randn(2, 1, 32, 32), torch.rand(2, 3, 32, 32))
    assert len(labeled) and g(seen).shape == (2, 3)
    one, other, saved = (
        torch.load(two / name, weights_only=True) for name in ("qp_0.pt", "qp_1.pt", "qp/last.pt")
    )
    assert all(
        torch.equal(one[k], other[k]) and torch.equal(one[k], saved["net"][k]) for k in one
    )  # of different images, the same weights


def test_alone_nothing_is_asked_of_others():
    x = torch.randn(3)
    assert (
        distributed.rank() == 0
        and distributed.world() == 1
        and distributed.mean(x) is x
        and distributed.gather([1, 2]) == [1, 2]
    )
    net = models.build("unet", channels=1, classes=2)
    assert distributed.synced(net) is net and not any(
        isinstance(m, distributed.SyncedNorm) for m in net.modules()
    )


if __name__ == "__main__":
    work(*sys.argv[1:])
