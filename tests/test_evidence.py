"""The experiment of results/evidence: its shortcut, its controls and its intervals."""

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import FakeG

import train_ssl
from data import h5, loading
from data.files import InputError
from models.losses import one_hot
from models.quality import Seen
from results.evidence import run, table


@pytest.fixture
def small(gray, gray_quality, tmp_path, monkeypatch):
    """The phantom as a data set of the experiment, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/v/tiny/g")
    run.split([gray, "runs/tiny.h5", "--patients", "1"])
    shutil.copy(gray_quality[1], "runs/v/tiny/g/qp.pt")
    monkeypatch.setitem(run.DATA, "tiny", dict(labeled=2, lr=1e-3, steps=6, start=3, every=2))
    monkeypatch.setattr(
        run, "COMMON", "--size 32 --width 4 --batch 3 --batch-unlabeled 3 --ema 0.9".split()
    )


def weights(path):
    state = torch.load(path, weights_only=True)
    return [v for net in [*state["nets"], state["teacher"]] for v in net.values()]


def test_the_last_patients_are_the_test_split(gray, small):
    full, part = h5.read_info(gray), h5.read_info("runs/tiny.h5")
    last = full.entries("train")[-1].patient
    assert [e.name for e in part.entries("train")] == [
        e.name for e in full.entries("train") if e.patient != last
    ]
    assert {e.patient for e in part.entries("test")} == {last} | {
        e.patient for e in full.splits.get("test", [])
    }


@pytest.mark.parametrize("family, row", [("bcp", "none")])
def test_a_run_from_the_common_start_is_the_whole_run(family, row, small):
    os.makedirs("runs/v/tiny/a")
    run.train("tiny", family, row, 0.5, 1, "runs/v/tiny/a")
    train_ssl.main(run.command("tiny", family, row, 0.5, 1, "b"))
    assert all(
        torch.equal(x, y)
        for x, y in zip(weights("runs/v/tiny/a/last.pt"), weights("b/last.pt"), strict=True)
    )
    assert os.path.isfile("runs/v/tiny/a/test/cases.csv")


def test_controls(small):
    """The oracle learns from hidden labels, the shuffled g from other answers.

    Afterwards train_ssl.py is what it was.
    """
    kept, found = (train_ssl.views, train_ssl.train_step, loading.load_slices), {}
    for row in ("none", "oracle_pixel", "blind", "blind_qw", "shuffled_pixel", "qar_hard"):
        out = f"runs/v/tiny/{row}"
        os.makedirs(out)
        run.train("tiny", "pseudo_label", row, 0.5, 1, out)
        found[row] = weights(f"{out}/last.pt")
    for a, b in (
        ("none", "oracle_pixel"),
        ("none", "blind"),
        ("blind", "blind_qw"),
        ("none", "shuffled_pixel"),
        ("none", "qar_hard"),
    ):
        assert not all(torch.equal(x, y) for x, y in zip(found[a], found[b]))
    assert kept == (train_ssl.views, train_ssl.train_step, loading.load_slices)


def test_the_oracle_knows_the_truth():
    oracle = run.Oracle()
    oracle.label, oracle.classes = torch.randint(3, (4, 16, 16)), 3
    truth = Seen(None, one_hot(oracle.label, 3)[:, 1:])
    assert torch.allclose(oracle(truth), torch.ones(4, 2)) and oracle.error(truth).sum() == 0
    wrong = Seen(None, one_hot((oracle.label + 1) % 3, 3)[:, 1:])
    assert (
        oracle(wrong).sum() < 1e-3
        and oracle.error(wrong).mean() == 1
        and oracle.belief(wrong).argmax(1).equal(oracle.label)
    )


def test_a_shuffled_g_answers_for_the_next_image():
    counts = lambda seen: seen.image[:, 0, 0, :1]
    g = run.Shuffled(FakeG(counts, counts, counts))
    image = torch.arange(3.0)[:, None, None, None].expand(3, 1, 4, 4)
    assert all(f(Seen(image, None)).flatten().tolist() == [2, 0, 1] for f in (g, g.error, g.belief))


def test_intervals_by_hand():
    """Equal differences have no width, and cases of one patient move together.

    Of one seed, it is the interval of a mean.
    """
    assert table.interval(np.full((3, 8), 2.0), np.arange(8)).tolist() == [2, 2]
    d = np.random.default_rng(1).normal(1, 1, (1, 400))
    low, high = table.interval(d, np.arange(400))
    assert low == pytest.approx(d.mean() - 1.96 * d.std() / 20, abs=0.01) and high == pytest.approx(
        d.mean() + 1.96 * d.std() / 20, abs=0.01
    )
    few, groups = (
        np.repeat(np.random.default_rng(2).normal(0, 1, (1, 8)), 10, 1),
        np.repeat(np.arange(8), 10),
    )
    alike, apart = (np.ptp(table.interval(few, g)) for g in (groups, np.arange(80)))
    assert alike > 2 * apart
    seeds = np.array([[0.0] * 50, [1.0] * 50, [2.0] * 50])
    assert table.interval(seeds, np.arange(50)).tolist() == [0, 2]


def test_at_a_glance(tmp_path, monkeypatch, capsys):
    """Runs are added to what is kept, and pairs counted by hand.

    A family whose `full` lacks a seed is none yet.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "SCORES", str(tmp_path / "scores.csv.gz"))
    (tmp_path / "runs/v/ph2/g").mkdir(parents=True)
    (tmp_path / "runs/v/ph2/g/qp.pt").write_text("g")

    def made(family, row, dice, seeds=(0, 1, 2), lam=1):
        for seed in seeds:
            folder = tmp_path / f"runs/v/ph2/{family}-{row}-{lam}-{seed}"
            (folder / "test").mkdir(parents=True)
            (folder / "log.csv").write_text(f"step,val_dice\n100,0.99\n200,{dice}\n")
            lines = [
                f"{checkpoint},{case},{case},{dice + case / 100},1"
                for checkpoint in ("best.pt", "last.pt")
                for case in range(3)
            ]
            (folder / "test/cases.csv").write_text(
                "\n".join(["checkpoint,case,patient,dice,hd95", *lines])
            )

    made("supervised", "none", 0.5)
    for family, none, correct, full in (
        ("pseudo_label", 0.6, 0.7, 0.75),
        ("mean_teacher", 0.6, 0.59, 0.7),
        ("ict", 0.6, 0.62, 0.7),
        ("cps", 0.6, 0.5, 0.6),
    ):
        (
            made(family, "none", none),
            made(family, "correct", correct),
            made(family, "full", full, seeds=(0, 1) if family == "cps" else (0, 1, 2)),
        )
    made("pseudo_label", "none", 0.5, seeds=[0], lam=0.3)  # a lambda that is worse on val
    made("ict", "correct_qw", 0.65)
    (
        made("unimatch", "none", 0.6),
        made("unimatch", "correct", 0.598),
        made("unimatch", "full", 0.59),
    )  # where labels harm, there is no half to reach
    table.add("ph2")
    shutil.rmtree("runs")
    table.glance(["ph2"], "correct")
    table.glance(["ph2"], "correct_qw")
    out, weighted = capsys.readouterr().out.split("### correct_qw")
    assert (
        "| supervised | 51.0 |" in out
        and "| pseudo_label | 61.0 → 71.0, +10.0 [+10.0, +10.0]; all labels +15.0 |" in out
        and "cps" not in out
    )
    assert (
        "Of 4 pairs" in out
        and "above its own baseline in 2, with an interval above zero in 2;" in out
    )
    assert "would give in 1; it is more than .3 points below in 1." in out
    assert (
        "| mean of the families | +2.7 [+2.7, +2.7] |" in out
    )  # (10 - 1 + 2 - .2) / 4, the same for every seed and case
    assert (
        "| ict | 61.0 → 66.0, +5.0 [+5.0, +5.0]; all labels +10.0 |" in weighted
        and "Of 1 pairs" in weighted
        and "would give in 1;" in weighted
    )


def test_what_is_kept_grows(tmp_path, monkeypatch):
    """A second session's runs join those of the first, and replace those of the same name.

    Other test cases are refused.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "SCORES", str(tmp_path / "scores.csv.gz"))
    g = tmp_path / "runs/v/ph2/g/qp.pt"
    g.parent.mkdir(parents=True)
    g.write_text("g")
    for asked in (
        lambda: table.runs_of("ph2"),
        lambda: table.add("ph2"),
        lambda: table.draw("f.png", []),
    ):
        with pytest.raises(InputError, match="no (finished )?run of|nothing to draw"):
            asked()

    def made(name, dice, cases="abc"):
        folder = tmp_path / "runs/v/ph2" / name
        (folder / "test").mkdir(parents=True, exist_ok=True)
        (folder / "log.csv").write_text(f"step,val_dice\n200,{dice}\n")
        (folder / "test/cases.csv").write_text(
            "\n".join(
                [
                    "checkpoint,case,patient,dice,hd95",
                    *(f"best.pt,{c},p{c},{dice},{i / 3}" for i, c in enumerate(cases)),
                ]
            )
        )
        table.add("ph2")
        shutil.rmtree(folder)

    made("ict-none-0.3-0", 0.5), made("ict-correct_qw-1-2", 0.6), made("ict-none-0.3-0", 0.7)
    runs, patients = table.runs_of("ph2")
    assert {
        (*key, lam, seed) for key, by in runs.items() for lam, seeds in by.items() for seed in seeds
    } == {("ict", "none", 0.3, 0), ("ict", "correct_qw", 1.0, 2)}
    found = runs["ict", "none"][0.3][0]
    assert (found.val, patients) == (0.7, ["pa", "pb", "pc"]) and found.scores["best.pt"][
        "dice"
    ].tolist() == [0.7] * 3
    assert found.scores["best.pt"]["hd95"].tolist() == [0, 0.3333, 0.6667]
    for cases in ("abcd", "bac"):
        with pytest.raises(InputError, match="other test cases"):
            made("ict-none-1-0", 0.5, cases=cases)
    shutil.rmtree(tmp_path / "runs/v/ph2/ict-none-1-0")
    g.write_text("another g")
    with pytest.raises(InputError, match="another g"):
        made("ict-none-1-0", 0.5)


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    """The command, from runs to what is printed and drawn.

    Lambda is that of the best val, the smaller one where two are equal.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "SCORES", str(tmp_path / "scores.csv.gz"))
    for name, val, dice in (
        ("none-0.3-0", 0.6, 0.4),
        ("none-1-0", 0.6, 0.7),
        ("none-3-0", 0.5, 0.9),
        ("correct_qw-1-0", 0.7, 0.5),
    ):
        folder = tmp_path / f"runs/v/cvc/ict-{name}/test"
        folder.mkdir(parents=True)
        (folder.parent / "log.csv").write_text(f"step,val_dice\n300,{val}\n")
        (folder / "cases.csv").write_text(
            "\n".join(
                [
                    "checkpoint,case,patient,dice,hd95",
                    *(
                        f"{part}.pt,{c},{c % 2},{dice},7"
                        for part in ("best", "last")
                        for c in range(4)
                    ),
                ]
            )
        )
    (tmp_path / "runs/v/cvc/g").mkdir()
    (tmp_path / "runs/v/cvc/g/qp.pt").write_text("g")
    monkeypatch.setattr(sys, "argv", ["table.py", "cvc", "--add", "--out", "f.png"])
    table.main()
    out = capsys.readouterr().out
    assert (
        "| ict | none | 0.3 | 1 | 40.0 | 7.0 |  |  |" in out
        and "| ict | correct_qw | 1 | 1 | 50.0 | 7.0 | +10.0 [+10.0, +10.0] | [+10.0, +10.0] |"
        in out
    )
    assert "### cvc, last.pt" in out and (tmp_path / "f.png").stat().st_size > 10_000
