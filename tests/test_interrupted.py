"""Runs that are killed, stopped, started twice, changed, or that find no room.

Nothing is lost, and nothing is silently wrong.
"""

import fcntl
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import h5py
import pytest
import soak
import torch
from conftest import ROOT, python

import corrupt
import models
import train_qp
import train_ssl
from data import files, workers
from data.files import InputError
from data.options import cli
from models.checkpoints import check_finite, load_checkpoint


@pytest.fixture
def scripts(gray, volumes, gray_quality):
    return soak.scripts(gray, volumes, *gray_quality)


@pytest.mark.parametrize(
    "name, number, less",
    [
        ("corrupt.py --workers 2", signal.SIGKILL, "--masks 15 --harvest-epochs 1,2"),
        ("train_ssl.py --cache off --workers 2", signal.SIGTERM, "--steps 16 --eval-every 4"),
    ],
)
def test_interrupted_at_a_random_moment_equals_uninterrupted(name, number, less, scripts, tmp_path):
    """Weights, optimizers, logs, masks and reports bit by bit; no process, no file left over.

    By tests/soak.py. The moment lies in the second half of the run, when there is something to go
    on from.
    """
    main, argv = scripts[name]
    (row,) = soak.soak(name, (main, [*argv, *less.split()]), tmp_path, 1, [number], 0.6)
    assert row["identical"] == row["ended"] == row["sent"] and row["items"] > 100, row


SSL = [
    *"--labeled 4 --size 32 --steps 12 --eval-every 4 --batch 4 --batch-unlabeled 4".split(),
    *"--width 4 --method mean_teacher".split(),
]
MASKS = [
    *"--labeled 4 --size 32 --masks 8 --val-masks 4 --harvest-share 0.25".split(),
    *"--harvest-epochs 1 --harvest-steps 1 --harvest-batch 16".split(),
]


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as in a terminal, also where the tests run in the background, with SIGINT ignored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.fixture
def stopped(monkeypatch):
    """stopped(script, argv, steps): the script runs, gets a signal during a step, and leaves.

    -> its exit code
    """

    def run(script, argv, steps, number=signal.SIGTERM):
        step, count = script.train_step, [0]

        def signaled(*args):
            count[0] += 1
            if count[0] == steps:
                signal.raise_signal(number)
            return step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(script, "train_step", signaled)
            try:
                script.main(argv)
            # pytest.raises would keep the script's frames, and with them the lock on its folder.
            except SystemExit as end:
                return end.code
        pytest.fail("the run ended before its signal")

    return run


def test_a_signal_ends_after_the_step_and_saves_it(gray, tmp_path, stopped):
    before = signal.getsignal(signal.SIGTERM)
    code = stopped(train_ssl, [gray, *SSL, "--out", str(tmp_path)], 6)
    state = load_checkpoint(tmp_path / "last.pt", "ssl")
    assert (code, state["step"], len(state["parts"]), state["finished"]) == (143, 6, 2, False)
    assert signal.getsignal(signal.SIGTERM) == before
    train_ssl.main([gray, *SSL, "--out", str(tmp_path), "--resume"])
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "4", "8", "12"]


def test_a_second_signal_does_not_wait(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    with workers.postponed_signals() as stop:
        assert stop() == 0
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun hands on what the terminal has sent, too
        assert stop() == 130
        now[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_closed_terminal_ends_as_sigterm_does():
    """And nothing ends that nohup has started."""
    usual = [signal.getsignal(number) for number in workers.ENDS]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
        with pytest.raises(SystemExit) as end:
            cli(lambda: signal.raise_signal(signal.SIGHUP))
        assert end.value.code == 129
        with workers.postponed_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop() == 129
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        cli(lambda: signal.raise_signal(signal.SIGHUP))
        with workers.postponed_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop() == 0
    finally:
        for number, handler in zip(workers.ENDS, usual):
            signal.signal(number, handler)


PRINTS_AT_THE_END = """
import sys, time
from data.options import cli
from data.workers import postponed_signals
def main():
    with postponed_signals() as stop:
        print("under way", flush=True)
        while not stop():
            time.sleep(0.01)
        print("saved", flush=True)
        sys.exit(stop())
cli(main)
"""


def test_what_is_printed_to_a_closed_terminal_is_no_error():
    ours, its = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", PRINTS_AT_THE_END],
        cwd=ROOT,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # the terminal is its own
    )
    os.close(its)
    assert b"under way" in os.read(ours, 100)
    os.close(ours)
    assert run.wait(60) == 129


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """full_disk(main, argv, limit, words): no file of more than `limit` bytes can be written.

    The run ends with exit code 2 and one line that holds the words.
    """

    def run(main, argv, limit, words):
        monkeypatch.setenv("SOAK_LOG", str(tmp_path / "said"))
        assert soak.fork(main, argv, limit) == 2
        (said,) = [line for line in (tmp_path / "said").read_text().split("\n") if "error" in line]
        assert words in said

    return run


def test_a_full_disk_keeps_the_last_checkpoint(gray, tmp_path, stopped, full_disk):
    run = tmp_path / "run"
    argv = [gray, *SSL, "--out", str(run)]
    stopped(train_ssl, argv, 4)
    before = (run / "last.pt").read_bytes()
    # room for a row of the log, and pictures for TensorBoard
    full_disk(train_ssl.main, [*argv, "--resume"], 300_000, "last.pt: cannot be written")
    assert (run / "last.pt").read_bytes() == before and not list(run.glob(".*.part"))


def test_a_full_disk_leaves_no_half_of_the_masks(gray, tmp_path, full_disk):
    run = tmp_path / "run"
    argv = [gray, *MASKS, "--out", str(run)]
    corrupt.main(argv)
    (run / "vqm.h5").unlink()
    full_disk(corrupt.main, [*argv, "--resume"], 20_000, "vqm.h5: cannot be written")
    assert not (run / "vqm.h5").exists() and not list(run.rglob(".*.part"))


def test_finished_masks_are_kept_unless_overwritten(gray, tmp_path, refused, capsys):
    argv = [gray, *MASKS, "--out", str(tmp_path)]
    corrupt.main(argv)
    before = (tmp_path / "vqm.h5").stat().st_mtime_ns
    corrupt.main([*argv, "--workers", "2"])
    assert (
        "finished" in capsys.readouterr().out and (tmp_path / "vqm.h5").stat().st_mtime_ns == before
    )
    corrupt.main([*argv, "--preview", str(tmp_path / "p.png")])
    assert f"\nwrote {tmp_path}/p.png\n" in "\n" + capsys.readouterr().out
    refused(
        corrupt.main,
        [*argv, "--seed", "1"],
        "started with --seed 0, not with --seed 1; give",
        "--overwrite",
    )
    corrupt.main([*argv, "--overwrite"])
    assert (tmp_path / "vqm.h5").stat().st_mtime_ns > before
    (tmp_path / "weak" / "last.pt").unlink()  # as where the first epoch was killed
    refused(corrupt.main, argv, "no last.pt; begin again with --resume or --overwrite")
    for again in ("--resume", "--overwrite"):
        (tmp_path / "vqm.h5").unlink(missing_ok=True)
        (tmp_path / "weak" / "last.pt").unlink(missing_ok=True)
        corrupt.main([*argv, again])
    for path in (tmp_path / "weak").iterdir():
        path.unlink()
    refused(corrupt.main, argv, "is there already", "--overwrite")


def test_masks_replace_masks_alone(gray, tmp_path, refused):
    data = tmp_path / "vqm.h5"
    data.write_bytes(Path(gray).read_bytes())
    argv = [data, *MASKS, "--out", tmp_path, "--overwrite"]
    refused(corrupt.main, argv, "vqm.h5: is no file of masks")
    data.write_text("mine")
    refused(corrupt.main, [gray, *argv[1:]], "vqm.h5: is no file of masks")
    assert data.read_text() == "mine" and not (tmp_path / "weak").exists()


def test_another_g_is_no_resuming(gray, gray_quality, tmp_path, stopped, refused):
    argv = [gray, *SSL, "--weight", "quality", "--out", str(tmp_path / "run"), "--qp"]
    state = load_checkpoint(gray_quality[1], "qp")
    for name in ("g.pt", "same.pt", "other.pt"):
        if name == "other.pt":
            state["weights"]["temperature"] += 1
        torch.save(state, tmp_path / name)
    (tmp_path / "same.pt").write_bytes((tmp_path / "g.pt").read_bytes())
    stopped(train_ssl, [*argv, str(tmp_path / "g.pt")], 3)
    refused(
        train_ssl.main,
        [*argv, str(tmp_path / "other.pt"), "--resume"],
        "another file as --qp",
        "other.pt",
        "--overwrite",
    )
    refused(
        train_ssl.main,
        [*argv, str(tmp_path / "g.pt"), "--resume", "--unlabeled", gray],
        "another file as --unlabeled",
    )
    train_ssl.main([*argv, str(tmp_path / "same.pt"), "--resume"])  # the same file at another place


def test_a_fresh_start_removes_the_files_of_a_run_alone(gray, gray_quality, tmp_path):
    g = load_checkpoint(gray_quality[1], "qp")
    torch.save(g, tmp_path / "g.pt")
    others = {"mine.pt", "qp.md", "events.txt", "step.pt", "step2_mine.pt"}
    for name in others:
        (tmp_path / name).write_text("mine")
    argv = [gray, *SSL, "--steps", "4", "--out", str(tmp_path), "--resume"]
    train_ssl.main([*argv, "--weight", "quality", "--qp", str(tmp_path / "g.pt")])
    assert load_checkpoint(tmp_path / "last.pt", "ssl")["finished"]
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"g.pt", *others} < kept
    (tmp_path / "step2.pt").write_text("of a run")
    (tmp_path / "log.csv").unlink()
    train_ssl.main([*argv[:-1], "--overwrite"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= {"g.pt", "best.pt", *others} and "step2.pt" not in left


def test_what_a_run_reads_is_not_replaced(gray, gray_quality, tmp_path, refused):
    """Nor a run of another stage, nor what another program has written."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.pt").write_bytes(Path(gray_quality[1]).read_bytes())
    guided = [gray, *SSL, "--weight", "quality", "--qp", run / "best.pt", "--out", run]
    refused(train_ssl.main, [*guided, "--overwrite"], "--qp is a file of the run", "another --out")
    refused(train_ssl.main, [*guided, "--resume"], "--qp is a file of the run")
    shutil.copytree(Path(gray_quality[1]).parent, tmp_path / "g")
    argv = [gray, *SSL, "--out", tmp_path / "g"]
    other = "is of another stage or program"
    refused(train_ssl.main, [*argv, "--overwrite"], f"last.pt: {other}")
    (tmp_path / "g" / "last.pt").unlink()
    for more in ([], ["--resume"], ["--overwrite"]):
        refused(train_ssl.main, [*argv, *more], other)
    for name, text in (
        ("log.csv", "when,what\n"),
        ("log.csv", "step,reward\n1,2\n2,3\n"),
        ("events.out.tfevents.1.mine", "x"),
    ):
        mine = tmp_path / "mine" / name
        mine.parent.mkdir()
        mine.write_text(text)
        argv = [gray, *SSL, "--out", mine.parent]
        refused(train_ssl.main, argv, "no last.pt" if text.count("\n") > 2 else other)
        refused(train_ssl.main, [*argv, "--overwrite"], f"{name}: {other}")
        assert mine.read_text() == text
        shutil.rmtree(mine.parent)
    (tmp_path / "mine").mkdir()
    for state in (dict(stage=[]), dict(state_dict={})):
        torch.save(state, tmp_path / "mine" / "best.pt")
        argv = [gray, *SSL, "--out", tmp_path / "mine", "--overwrite"]
        refused(train_ssl.main, argv, f"best.pt: {other}")
    (tmp_path / "mine" / "best.pt").unlink()
    (tmp_path / "mine" / "best.pt").symlink_to(tmp_path / "gone.pt")
    train_ssl.main([*map(str, argv), "--steps", "2"])


def test_other_patients_are_no_resuming(gray, tmp_path, refused):
    """They decide whose labels are used, and the folds of weak networks."""
    data = tmp_path / "f.h5"
    data.write_bytes(Path(gray).read_bytes())
    ssl = [data, *SSL[:-2], "--steps", "2", "--out", tmp_path / "run"]
    masks = [data, *MASKS, "--out", tmp_path / "vqm"]
    train_ssl.main([*map(str, ssl)])
    corrupt.main([*map(str, masks)])
    with h5py.File(data, "r+") as f:
        for case in list(f["train"].values())[:2]:
            case.attrs["patient"] = "one"
    for main, argv in ((train_ssl.main, ssl), (corrupt.main, masks)):
        refused(main, [*argv, "--resume"], "started on other data (patients_checksum")


def test_other_masks_are_no_resuming(gray, gray_quality, tmp_path, stopped, refused):
    argv = [
        "--out",
        str(tmp_path / "g"),
        *"--width 4 --members 1 --epochs 2 --batch 16 --vqm".split(),
    ]
    code = stopped(train_qp, [gray, *argv, gray_quality[0]], 2, signal.SIGINT)
    assert code == 130
    corrupt.main([gray, *MASKS, "--seed", "5", "--out", str(tmp_path / "vqm")])
    refused(
        train_qp.main,
        [gray, *argv, tmp_path / "vqm" / "vqm.h5", "--resume"],
        "another file as --vqm",
    )


def test_g_stopped_within_an_epoch_equals_uninterrupted(gray, gray_quality, tmp_path, stopped):
    options = "--width 4 --members 1 --epochs 2 --per-image 8 --batch 16 --vqm".split()
    whole, parts = ([gray, *options, gray_quality[0], "--out", str(tmp_path / n)] for n in "wp")
    train_qp.main(whole)
    stopped(train_qp, parts, 2)
    assert len(torch.load(tmp_path / "p" / "last.pt", weights_only=True)["losses"]) == 2
    train_qp.main([*parts, "--resume"])
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in "wp")
    assert all(torch.equal(a[w][k], b[w][k]) for w in ("net", "weights") for k in a[w])


def test_one_folder_one_process(tmp_path, monkeypatch):
    """flock, released by the system when the process dies."""
    hold = (
        f"import time; from data.files import claim; held = claim({str(tmp_path)!r}); "
        "print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        (tmp_path / ".x.pt.1.part").touch()
        monkeypatch.setattr(
            files, "FileLock", lambda *args, timeout, **more: FileLockNow(*args, timeout=0, **more)
        )
        with pytest.raises(InputError, match="another process"):
            files.claim(str(tmp_path))
        assert (tmp_path / ".x.pt.1.part").exists()
        other.kill()
        other.wait()
    held = files.claim(str(tmp_path))
    assert held.is_locked and not (tmp_path / ".x.pt.1.part").exists()


FileLockNow = files.FileLock


def test_a_row_that_was_cut_short_is_written_anew(gray, tmp_path, stopped):
    argv = [gray, *SSL, "--out", str(tmp_path)]
    stopped(train_ssl, argv, 5)
    with open(tmp_path / "log.csv", "a") as f:
        f.write("1")  # of "12,..."
    train_ssl.main([*argv, "--resume"])
    assert [row.split(",")[0] for row in (tmp_path / "log.csv").read_text().splitlines()] == [
        "step",
        "4",
        "8",
        "12",
    ]


@pytest.fixture
def guided(gray, gray_quality):
    """Arguments of a run with QAR."""
    return [gray, *SSL, "--qp", gray_quality[1], "--qar", "0.01"]


@pytest.mark.parametrize("wrong, words", [("sup", "lower --lr"), ("qar", "g's answers")])
def test_a_loss_that_is_not_finite_names_step_and_terms(
    wrong, words, guided, tmp_path, monkeypatch, refused
):
    step = train_ssl.train_step

    def broken(run, batch, args, number):
        parts = step(run, batch, args, number)
        if number == 7:
            parts[[0, train_ssl.PARTS.index(wrong)]] = float("nan")
        return parts

    monkeypatch.setattr(train_ssl, "train_step", broken)
    refused(
        train_ssl.main,
        [*guided, "--out", tmp_path],
        "step 7: the loss is not finite",
        f"{wrong} nan",
        words,
    )
    assert load_checkpoint(tmp_path / "last.pt", "ssl")["step"] == 4


def test_a_weight_that_is_not_finite_is_never_saved():
    net = models.build("unet", channels=1, classes=2, width=4)
    check_finite(torch.zeros(3, 1), ["loss"], [net], 3, lambda parts: "")
    list(net.parameters())[3].data[0] = float("inf")
    with pytest.raises(InputError, match="step 3: weights are not finite"):
        check_finite(torch.zeros(3, 1), ["loss"], [net], 3, lambda parts: "less")


def test_nothing_to_write_to_is_known_before_the_work(gray, tmp_path, refused, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train_ssl, "train_step", None)
    monkeypatch.setattr(corrupt, "train_weak", None)
    refused(
        train_ssl.main,
        [gray, *SSL, "--out", tmp_path / "file" / "run"],
        "cannot be written to",
        "choose another",
    )
    refused(
        corrupt.main,
        [gray, *MASKS, "--out", tmp_path / "file" / "run"],
        "cannot be written to",
        "choose another",
    )


def test_deterministic_gives_the_same_weights_in_another_process(gray, tmp_path):
    argv = [
        gray,
        *SSL[:-2],
        *"--steps 3 --method unimatch --lam-warmup 0 --deterministic --out".split(),
    ]
    done = python("train_ssl.py", *argv, tmp_path / "a", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "next: python evaluate.py" in done.stdout
    try:
        train_ssl.main([*argv, str(tmp_path / "b")])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = (load_checkpoint(tmp_path / run / "last.pt", "ssl")["nets"][0] for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_stopped_in_its_first_epoch_keeps_its_checkpoint(
    gray, gray_quality, tmp_path, monkeypatch, stopped
):
    """Until it has a newer one: a resumed run that cannot write has lost nothing."""
    argv = [
        gray,
        "--out",
        str(tmp_path),
        *"--width 4 --members 1 --epochs 2 --batch 16".split(),
        "--vqm",
        gray_quality[0],
    ]
    stopped(train_qp, argv, 1)
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(train_qp, "train_step", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(InputError, match="not finite"):
        train_qp.main([*argv, "--resume"])
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_whose_last_checkpoint_is_gone_is_not_trained_again_unasked(gray, tmp_path, refused):
    """It may be finished. One that was killed before its first last.pt begins again."""
    argv = [gray, *SSL[:-2], "--steps", "6", "--eval-every", "2", "--out", str(tmp_path)]
    train_ssl.main(argv)
    (tmp_path / "last.pt").unlink()
    before = (tmp_path / "best.pt").read_bytes()
    for more in ([], ["--resume"]):
        refused(train_ssl.main, [*argv, *more], "no last.pt; begin again with --overwrite")
    assert (tmp_path / "best.pt").read_bytes() == before
    log = (tmp_path / "log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "log.csv").write_text("".join(log[:2]))
    train_ssl.main([*argv, "--resume"])
    assert (tmp_path / "log.csv").read_text().count("\n") == len(log)


def test_a_change_of_how_val_is_seen_is_noted(volumes, tmp_path, monkeypatch, capsys):
    """Dice of whole passes and of windows choose best.pt together."""
    argv = [volumes, "--size", "16,16,32", "--width", "4", "--batch", "2", "--steps", "2"]
    argv += ["--out", str(tmp_path), "--labeled", "2", "--eval-every", "1", "--resume"]
    save_run = train_ssl.save_run

    def stops(*args, **more):
        save_run(*args, **more)
        if args[0].endswith("last.pt"):
            raise KeyboardInterrupt

    monkeypatch.setattr(train_ssl, "save_run", stops)
    with pytest.raises(KeyboardInterrupt):
        train_ssl.main(argv)
    monkeypatch.setattr(train_ssl, "save_run", save_run)
    train_ssl.main([*argv, "--window", "whole"])
    said = capsys.readouterr().out
    assert "started with --window sliding and goes on with --window whole" in said
    assert said.count("goes on with") == 1
