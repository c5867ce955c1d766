"""The experiment of results/evidence: its shortcut, its controls and its tables."""

import csv
import os
import re
import shutil
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import FakeG

import train_ssl
from data import h5, loading
from data.files import InputError
from models import checkpoints
from models.losses import one_hot
from models.quality import DenseQualityPredictor, Seen
from results.evidence import controls, run, table


@pytest.fixture
def tiny(gray, gray_quality, tmp_path, monkeypatch):
    """The phantom as the data sets of the experiment, in an empty folder, with a g of each seed."""
    monkeypatch.chdir(tmp_path)
    run.split([gray, "runs/tiny.h5", "--patients", "1"])
    shutil.copy(gray, "runs/other.h5")
    for name in ("g", "g-1", "g-2"):
        os.makedirs(f"runs/evidence/tiny/tiny/{name}")
        shutil.copy(gray_quality[1], f"runs/evidence/tiny/tiny/{name}/qp.pt")
    mine = run.Data("tiny", 2, "1e-3", "", "")
    monkeypatch.setattr(run, "DATA", {"tiny": mine, "more": mine._replace(archive="other")})
    small = "--size 32 --width 4 --batch 3 --batch-unlabeled 3 --steps 10 --eval-every 3"
    monkeypatch.setattr(run, "TIERS", {"tiny": small})


def weights(path):
    state = torch.load(path, weights_only=True)
    return [v for net in [*state["nets"], state["teacher"]] for v in net.values()]


def test_the_last_patients_are_the_test_split(gray, tiny):
    full, part = h5.read_info(gray), h5.read_info("runs/tiny.h5")
    last = full.entries("train")[-1].patient
    assert [e.name for e in part.entries("train")] == [
        e.name for e in full.entries("train") if e.patient != last
    ]
    assert {e.patient for e in part.entries("test")} == {last} | {
        e.patient for e in full.splits.get("test", [])
    }


def test_a_run_from_the_common_start_is_the_whole_run(tiny):
    """To the last bit, and its validations are the same. A finished run is left as it is.

    The start is supervised and without the archive; its validations do not count for best.pt.
    """
    job = run.Job("more", "mean_teacher", "correct_qw", 1)
    out = run.place("tiny", job)
    run.run("tiny", job)
    train_ssl.main(run.options("tiny", job, "whole"))
    pairs = zip(weights(f"{out}/last.pt"), weights("whole/last.pt"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    best = [torch.load(f"{folder}/last.pt", weights_only=True)["best"] for folder in (out, "whole")]
    assert best[0] == best[1]
    logs = []
    for folder in (out, "whole"):
        with open(f"{folder}/log.csv", newline="") as f:
            logs.append([{**line, "ms": ""} for line in csv.DictReader(f)])
    assert logs[0] and all(line in logs[1] for line in logs[0])
    before = os.stat(f"{out}/last.pt").st_mtime_ns
    run.run("tiny", job)
    assert os.stat(f"{out}/last.pt").st_mtime_ns == before and run.finished(out)


def test_a_run_that_another_process_is_at_is_passed_over(tiny, monkeypatch, capsys):
    """The list goes on with the next, and comes back to it."""
    asked, done = [], set()

    def run_one(tier, job):
        asked.append(job.row)
        if asked == ["none", "qw"]:
            raise InputError("runs/x: another process is writing to it")
        done.add(run.place(tier, job))

    monkeypatch.setattr(run, "run", run_one)
    monkeypatch.setattr(run, "finished", done.__contains__)
    monkeypatch.setattr(sys, "argv", "run --data tiny --methods ict --seeds 2 --tier tiny".split())
    run.main()
    assert asked == ["none", "qw", "correct_qw", "trust_qw", "qw"]
    assert capsys.readouterr().out == "passed over: runs/x: another process is writing to it\n"


def test_a_time_limit_ends_without_an_error(tiny, monkeypatch):
    """The signal that it sends stops a run, which ends its process as train_ssl.py does."""
    sent = []

    class Timer:
        def __init__(self, seconds, kill, words):
            self.finished = threading.Event()
            self.about = seconds, kill, words

        def start(self):
            sent.append(self.about)
            self.finished.set()

    def stopped(tier, job):
        sys.exit(143)

    monkeypatch.setattr(run.threading, "Timer", Timer)
    monkeypatch.setattr(run, "run", stopped)
    words = "run --data tiny --methods ict --seeds 2 --tier tiny".split()
    monkeypatch.setattr(sys, "argv", [*words, "--minutes", "2"])
    run.main()
    assert sent == [(120, os.kill, (os.getpid(), signal.SIGTERM))]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):  # somebody else's signal
        run.main()


def test_a_split_keeps_patients_in_train(gray, tiny, refused):
    for patients in ("0", "99"):
        refused(run.split, [gray, "new.h5", "--patients", patients], patients)
    assert not os.path.exists("new.h5")


def test_files_that_are_missing_are_named_before_anything_runs(tiny, monkeypatch):
    monkeypatch.setitem(run.DATA, "large", run.DATA["tiny"]._replace(full=True))
    monkeypatch.setattr(sys, "argv", "run --data large tiny --tier tiny".split())
    with pytest.raises(InputError, match="large: is of --tier full alone"):
        run.main()
    os.remove("runs/other.h5")
    monkeypatch.setattr(sys, "argv", "run --data more --tier tiny".split())
    with pytest.raises(InputError, match="runs/other.h5: no such file"):
        run.main()
    assert not os.path.exists("runs/evidence/tiny/more")


def test_an_archive_is_unlabeled_and_shares_the_start_and_g():
    foreign = run.Job("ph2_foreign", "mean_teacher", "qw", 2)
    words = " ".join(run.options("small", foreign, "OUT"))
    assert "--unlabeled runs/cvc.h5" in words and "runs/ph2.h5 --out OUT --seed 2" in words
    assert "--qp runs/evidence/small/ph2/g-2/qp.pt" in words
    half = " ".join(run.options("small", foreign._replace(row="qw_half"), "OUT"))
    assert "--qp runs/evidence/small/ph2/g_half/qp.pt" in half  # one for all seeds
    assert run.start_of(foreign) == run.Job("ph2", "supervised", "none", 2)
    bcp = run.Job("ph2_foreign", "bcp", "none", 0)
    assert run.start_of(bcp) == bcp._replace(data="ph2")


def test_the_list_names_each_run_once_and_can_be_parsed():
    for tier, sets in (("small", {"ph2", "acdc", "cvc", "ph2_foreign"}), ("full", set(run.DATA))):
        jobs = list(run.jobs(tier))
        assert len(set(jobs)) == len(jobs) > 500 and {job.data for job in jobs} == sets
        for job in jobs[:: len(jobs) // 40]:
            args = train_ssl.parse_args(run.options(tier, job, "OUT"))
            assert args.method == job.method and (args.labeled == "all") == (job.row == "all")
            assert len(args.size) == (3 if run.DATA[job.data].volumes else 1)
    assert run.quality_of("full", "acdc_3") != run.quality_of("full", "acdc")
    assert run.start_of(run.Job("la_8", "ict", "qw", 1)) == run.Job("la_8", "supervised", "none", 1)


def test_controls_differ_and_leave_no_trace(tiny, monkeypatch):
    """Each stand-in trains other weights than g. Afterwards train_ssl.py is what it was."""
    kept = [getattr(module, name) for module, name in controls.PATCHED]
    monkeypatch.setattr(run.evaluate, "main", lambda argv: None)
    monkeypatch.setattr(run, "SEEDS", [0])  # an ensemble of one
    monkeypatch.setitem(run.TIERS, "tiny", run.TIERS["tiny"] + " --steps 6 --eval-every 6")
    all_weigh = {row: f"{words} --weight-threshold 0" for row, words in run.ROWS.items()}
    monkeypatch.setattr(run, "ROWS", all_weigh)
    rows = ["none", "correct_qw", "distill_qw", "blind", "correct", "qw", "shuffled", "oracle"]
    jobs = {row: run.Job("tiny", "mean_teacher", row, 0) for row in rows}
    for job in jobs.values():
        run.run("tiny", job)
    last = {row: weights(f"{run.place('tiny', job)}/last.pt") for row, job in jobs.items()}
    alike = [("correct_qw", "distill_qw"), ("correct", "blind"), ("qw", "shuffled")]
    for a, b in [*alike, ("qw", "oracle"), ("none", "correct"), ("none", "oracle")]:
        assert not all(torch.equal(*pair) for pair in zip(last[a], last[b], strict=True)), (a, b)
    assert kept == [getattr(module, name) for module, name in controls.PATCHED]


@pytest.mark.parametrize("row", ["at_test", "at_test_ensemble"])
def test_outputs_of_a_run_are_corrected_as_far_as_val_gains(row, tiny, monkeypatch):
    """The run `none` is trained, unless it is there; its outputs are scored, not trained again."""
    asked, seen, values = [], [], {}

    def found(split, net):
        seen.append(type(net.g))
        assert split.cases.split == "val"
        return values[net.trust]

    monkeypatch.setattr(run.Split, "dice", found)
    monkeypatch.setattr(run.evaluate, "main", asked.append)
    monkeypatch.setattr(run, "SEEDS", [0])  # an ensemble of one
    job = run.Job("tiny", "mean_teacher", row, 0)
    plain, out = run.place("tiny", job._replace(row="none")), run.place("tiny", job)
    trained = []
    for dice, trust in (((0.3, 0.5, 0.4), "0.5"), ((0.5, 0.5, 0.4), "0.0")):
        values.update(zip(run.train_ssl.TRUSTS, dice))
        run.run("tiny", job)
        trained.append(os.stat(f"{plain}/last.pt").st_mtime_ns)
        words = asked[-1]
        assert words[1:5] == [f"{plain}/best.pt", f"{plain}/last.pt", "--split", "test"]
        assert words[words.index("--trust") + 1] == trust and f"{out}/test" in words
    assert trained[0] == trained[1] and not os.path.isfile(f"{out}/best.pt")
    judge = controls.Ensemble if row == "at_test_ensemble" else DenseQualityPredictor
    assert seen == [judge] * 3 * 2


@pytest.mark.usefixtures("unrendered")
def test_g_is_trained_and_scored_as_a_network(tiny, monkeypatch, capsys):
    """Where qp.pt is missing. Beside it: an ensemble, and a supervised run that g corrects."""
    os.remove("runs/evidence/tiny/tiny/g/qp.pt")
    stages = "--masks 8 --harvest-epochs 1 --harvest-steps 2", "--epochs 1 --width 4 --members 1"
    monkeypatch.setitem(run.DATA, "tiny", run.DATA["tiny"]._replace(masks=stages[0], g=stages[1]))
    monkeypatch.setattr(run, "SEEDS", [0])
    job = run.Job("tiny", "supervised", "none", 0)
    run.run("tiny", job)
    monkeypatch.setattr(sys, "argv", ["run", "g", "tiny", "--tier", "tiny"])
    run.main()
    last = capsys.readouterr().out.splitlines()
    found = [line.split(": ") for line in last if line.startswith("tiny, ")]
    paths = [f"{run.place('tiny', job)}/{name}.pt" for name in ("step3", "best")]
    assert [name for name, _ in found] == [f"tiny, {who}" for who in ("g", "ensemble", *paths)]
    dice = re.findall(r"\d+\.\d", " ".join(text for _, text in found))
    assert len(dice) == 2 + 2 * 3 and all(0 <= float(value) <= 100 for value in dice)
    assert os.path.isfile("runs/evidence/tiny/tiny/g/qp.pt")


def test_g_of_an_earlier_epoch_is_not_the_one(gray_quality, tmp_path):
    path, state = tmp_path / "qp.pt", torch.load(gray_quality[1], weights_only=True)
    assert run.is_trained(gray_quality[1]) and not run.is_trained(path)
    state["epoch"] -= 1
    torch.save(state, path)
    assert not run.is_trained(path)


def test_each_seed_has_a_g_and_an_ensemble_of_its_own(tiny, monkeypatch):
    trained = []
    monkeypatch.setattr(
        run, "is_trained", lambda path: trained.append(os.path.dirname(path)) or True
    )
    monkeypatch.setattr(run, "ensemble", lambda *args: trained.append(args[-1]) or [])
    for row, seed in (("at_test", 2), ("at_test_ensemble", 1), ("trust_qw", 0), ("qw_half", 2)):
        run.control_of("tiny", run.Job("tiny", "mean_teacher", row, seed))
    g = "runs/evidence/tiny/tiny/g"
    assert trained == [f"{g}-2", f"{g}-1", 1, g, f"{g}_half"]


def test_the_oracle_knows_the_truth():
    oracle = controls.Oracle()
    oracle.label, oracle.classes = torch.randint(3, (4, 16, 16)), 3
    truth = Seen(None, one_hot(oracle.label, 3)[:, 1:])
    assert torch.allclose(oracle(truth), torch.ones(4, 2)) and oracle.error(truth).sum() == 0
    wrong = Seen(None, one_hot((oracle.label + 1) % 3, 3)[:, 1:])
    assert (
        oracle(wrong).sum() < 1e-3
        and oracle.error(wrong).mean() == 1
        and oracle.belief(wrong).argmax(1).equal(oracle.label)
    )


def test_the_oracle_is_told_the_labels_of_the_batch(tiny):
    """Where the label itself is the image, they stay together, whatever was augmented."""
    info = h5.read_info("runs/tiny.h5")
    job = run.Job("tiny", "mean_teacher", "oracle", 0)
    args = train_ssl.parse_args(run.options("tiny", job, "out"))
    train_ssl.set_defaults(args, info)
    oracle = controls.Oracle()
    with controls.stand_in(oracle):
        assert checkpoints.load_quality("none") == (oracle, [])
        slices = loading.load_slices(info, "train", args.size, None, labels=False)
        item = slices.fetch(torch.arange(6), torch.rand(6, 3))
        seen = item._replace(image=item.label[:, None], mean=0 * item.mean, std=item.std**0)
        batch = train_ssl.views((item, seen, torch.ones(6)), info, args, torch.device("cpu"))
    assert oracle.label.any() and not torch.equal(oracle.label, item.label.long())
    assert (batch.u[:, 0].round() == oracle.label).float().mean() > 0.95
    label = one_hot(oracle.label, 4)[:, 1:]
    assert torch.allclose(oracle(Seen(batch.u, label)), torch.ones(6, 3))


def test_a_shuffled_g_answers_for_the_next_image():
    counts = lambda seen: seen.image[:, 0, 0, :1]
    g = controls.Shuffled(FakeG(counts, counts, counts))
    image = torch.arange(3.0)[:, None, None, None].expand(3, 1, 4, 4)
    assert all(f(Seen(image, None)).flatten().tolist() == [2, 0, 1] for f in (g, g.error, g.belief))


@pytest.mark.parametrize("grid", [(24, 20), (16, 24, 20)])
def test_a_blind_g_answers_on_the_grid_of_the_mask_without_seeing_it(grid):
    g = DenseQualityPredictor(1, 3, dims=len(grid), width=4, members=1, size=16).eval()
    image, mask = torch.randn(2, 1, *grid), torch.randint(2, (2, 2, *grid)).float()
    belief = controls.Blind(g).belief(Seen(image, mask))
    assert belief.shape == (2, 3, *grid) and torch.allclose(belief.sum(1), torch.ones(2, *grid))
    assert torch.equal(belief, controls.Blind(g).belief(Seen(image, 1 - mask)))
    assert not torch.equal(g.belief(Seen(image, mask)), g.belief(Seen(image, 1 - mask)))


def test_an_ensemble_answers_by_its_mean_probabilities():
    """Two sure networks that disagree on the left half: belief, expected Dice, error by hand."""

    class Says(torch.nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, image):
            return 50 * one_hot(self.label, 2)

    left = torch.zeros(1, 8, 8, dtype=torch.long)
    left[..., :4] = 1
    both = controls.Ensemble([Says(left), Says(torch.ones_like(left))])
    seen = Seen(torch.zeros(1, 1, 8, 8), left[:, None].float())
    belief = both.belief(seen)[0, 1]
    assert torch.allclose(belief[:, :4], torch.ones(8, 4))
    assert torch.allclose(belief[:, 4:], torch.full((8, 4), 0.5))
    s = 64 / 10_000
    assert both(seen).item() == pytest.approx((2 * 32 + s) / (32 + 32 + 16 + s))
    assert torch.allclose(both.error(seen)[0, :, :4], torch.zeros(8, 4), atol=1e-6)
    assert torch.allclose(both.error(seen)[0, :, 4:], torch.full((8, 4), 0.5))


def test_intervals_by_hand():
    """Equal differences have no width, and cases of one patient move together.

    Of one seed, it is the interval of a mean.
    """
    assert table.interval(np.full((3, 8), 2.0), np.arange(8)).tolist() == [2, 2]
    d = np.random.default_rng(1).normal(1, 1, (1, 400))
    low, high = table.interval(d, np.arange(400))
    half = 1.96 * d.std() / 20
    assert low == pytest.approx(d.mean() - half, abs=0.01)
    assert high == pytest.approx(d.mean() + half, abs=0.01)
    few = np.repeat(np.random.default_rng(2).normal(0, 1, (1, 8)), 10, 1)
    groups = np.repeat(np.arange(8), 10)
    alike, apart = (np.ptp(table.interval(few, g)) for g in (groups, np.arange(80)))
    assert alike > 2 * apart
    seeds = np.array([[0.0] * 50, [1.0] * 50, [2.0] * 50])
    assert table.interval(seeds, np.arange(50)).tolist() == [0, 2]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(data, name, dice): a finished run with this mean Dice at best, .1 less last.

    Case a has .01 less than b, and c .01 more; their HD95 is 7, 8, 9.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "SCORES", str(tmp_path / "scores_{}.csv.gz"))

    def make(data, name, dice, cases="abc"):
        folder = tmp_path / f"runs/evidence/small/{data}/{name}/test"
        folder.mkdir(parents=True)
        lines = ["checkpoint,case,patient,dice,hd95"]
        for checkpoint, less in (("best.pt", 0), ("last.pt", 0.1)):
            for case in cases:
                rank = ord(case) - ord("b")
                for of_class in (0.05, -0.05):
                    value = dice - less + 0.01 * rank + of_class
                    lines.append(f"x/{checkpoint},{case},p{case},{value},{8 + rank}")
        (folder / "cases.csv").write_text("\n".join(lines))

    return make


def test_tables_by_hand(made, capsys, monkeypatch):
    """Gains are paired by seed; a mean is of the methods that have the most of them.

    Rows of an earlier machine are compared with the run `none` of that machine, `elsewhere`.
    """
    for seed in range(3):
        made("ph2", f"bcp-none-{seed}", 0.6 + 0.1 * seed)
        made("ph2", f"bcp-correct-{seed}", 0.63 + 0.1 * seed)
        made("ph2", f"bcp-distill_qw-{seed}", 0.63 + 0.1 * seed)
        made("ph2", f"bcp-published-{seed}", 0.7)
        made("ph2", f"fixmatch-none-{seed}", 0.5)
        made("ph2", f"fixmatch-distill_qw-{seed}", 0.51)
    made("ph2", "ict-elsewhere-0", 0.5)
    made("ph2", "ict-none-0", 0.52)
    made("ph2", "ict-at_test-0", 0.55)
    made("ph2", "ict-trust_qw-0", 0.56)
    made("ph2", "fixmatch-trust_qw-0", 0.53)
    made("ph2", "ict-correct_qw-0", 0.6)
    made("ph2", "ict-distill_qw-0", 0.58)
    made("cvc", "bcp-none-0", 0.3)
    table.main(["--add", "--rows", "--out", "f.png"])
    best, last = capsys.readouterr().out.split("at the last step")
    assert "| bcp | none | 70.0 ± 10.0 |  | 30.0 (1) |  |" in best
    assert "| bcp | none | 60.0 ± 10.0 |  | 20.0 (1) |  |" in last
    assert "| bcp | correct | +3.0 [+3.0, +3.0] |  |  |  |" in best
    assert "| ict | elsewhere | 50.0 (1) |  |  |  |" in best
    assert "| ict | at_test | +3.0 [+3.0, +3.0] (1) |  |  |  |" in best
    assert "| ict | correct_qw over distill_qw | +2.0 [+2.0, +2.0] (1) |  |  |  |" in best
    assert "| **mean** | distill_qw | +2.0 [+2.0, +2.0] |  |  |  |" in best
    assert "la_4" not in best and "published" not in best and os.path.getsize("f.png") > 10_000

    table.main([])
    best = capsys.readouterr().out.split("at the last step")[0]
    assert "| bcp | 70.0 ± 10.0 |  |  | +3.0 [+3.0, +3.0] |  |  |" in best
    trusted, distilled, corrected = (f"+{g} [+{g}, +{g}] (1)" for g in ("4.0", "8.0", "3.0"))
    assert f"| ict | 52.0 (1) |  | {trusted} | {distilled} | {corrected} |  |" in best
    assert "| fixmatch | 50.0 ± 0.0 |  | +3.0 [+3.0, +3.0] (1) | +1.0 [+1.0, +1.0] |" in best
    assert "| **mean** |  |  | +3.5 [+3.5, +3.5] (1) | +2.0 [+2.0, +2.0] |  |  |" in best
    assert "**cvc**" not in best  # nothing beside the baseline
    shutil.rmtree("runs")
    table.main(["--baselines"])
    out = capsys.readouterr().out
    assert "| bcp | 70.0 ± 10.0 | 70.0 ± 0.0 |  |  | 30.0 (1) |  |" in out
    assert "| ict | 52.0 (1) |  |  |  |  |  |" in out


def test_what_is_kept_grows(made):
    """A second session's runs join those of the first, and replace those of the same name."""
    with pytest.raises(InputError, match="nothing to draw"):
        table.draw("f.png", table.Table("small", "best.pt"))
    made("ph2", "ict-none-0", 0.5)
    table.add("small")
    shutil.rmtree("runs")
    made("ph2", "ict-none-0", 0.7)
    made("ph2", "ict-none-1", 0.6)
    table.add("small")
    with open(table.SCORES.format("small"), "rb") as f:
        before = f.read()
    table.add("small")
    with open(table.SCORES.format("small"), "rb") as f:
        assert f.read() == before
    runs = table.Table("small", "best.pt").runs["ph2", "ict", "none"]
    assert {seed: one.dice.mean().round(4) for seed, one in runs.items()} == {0: 0.7, 1: 0.6}
    assert runs[0].patients == ["pa", "pb", "pc"] and runs[0].hd95.tolist() == [7, 8, 9]
    made("ph2", "ict-none-2", 0.8, cases="cab")  # the same cases in another order
    table.add("small")
    turned = table.Table("small", "best.pt").runs["ph2", "ict", "none"][2]
    assert turned.patients == ["pa", "pb", "pc"] and turned.hd95.tolist() == [7, 8, 9]
    assert turned.dice.tolist() == [0.79, 0.8, 0.81]
    made("ph2", "ict-qw-0", 0.5, cases="abd")
    with pytest.raises(InputError, match="other test cases"):
        table.add("small")


def test_the_command_lists_what_is_left(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "run --data tiny --methods ict --seeds 2 --list".split())
    monkeypatch.setattr(run, "TIERS", {"small": ""})
    os.makedirs("runs/evidence/small/tiny/ict-qw-2/test")
    open("runs/evidence/small/tiny/ict-qw-2/test/summary.md", "w").close()
    run.main()
    left = [f"runs/evidence/small/tiny/ict-{row}-2" for row in ("none", "correct_qw", "trust_qw")]
    *found, last = capsys.readouterr().out.splitlines()
    assert found == left and last.startswith("3 runs are left")
