"""Kills every stage that writes checkpoints at random moments, and goes on with --resume.

The result is compared with that of a run that nothing interrupted.

    python tests/soak.py [--kills 20] [--only TEXT] > table.md    # kills and signals
    python tests/soak.py --memory 2000 > table.md        # memory and open files of so many steps

Runs are forked from this process, so that a moment falls into the run, not into the seconds in
which Python imports torch.
"""

import argparse
import csv
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import psutil
import torch
import torch._dynamo  # for seconds, each child would else import it with its first optimizer

sys.path.insert(0, str(Path(__file__).parent.parent))

import corrupt  # noqa: E402
import train_qp  # noqa: E402
import train_ssl  # noqa: E402
from data import phantom  # noqa: E402
from data.options import cli

CORRUPT = [
    *"--labeled 4 --size 32 --masks 60 --val-masks 10 --harvest-share .25".split(),
    *"--harvest-epochs 1,2,3 --harvest-steps 3 --harvest-batch 4".split(),
]
QP = "--width 4 --members 1 --epochs 3 --batch 16 --size 32 --per-image 20".split()
SSL = [
    *"--labeled 4 --size 32 --steps 60 --eval-every 10 --batch 4 --batch-unlabeled 4".split(),
    *"--width 4 --lr 1e-3 --method mean_teacher".split(),
]
GUIDED = "--lam-warmup .1 --weight quality --weight-threshold 0 --qar .01".split()


def prepare(folder):
    """The data of all runs, made anew: a phantom, its masks and g. -> the arguments of scripts()"""
    data = str(folder / "p.h5")
    volumes = str(folder / "v.h5")
    vqm = str(folder / "masks" / "vqm.h5")
    cases = "--train 6 --val 2 --test 1".split()
    fork(phantom.main, ["--out", data, *cases, *"--depth 4 --size 48".split()])
    fork(phantom.main, ["--out", volumes, *cases, *"--depth 20 --size 40 --dims 3".split()])
    fork(corrupt.main, [data, "--out", str(folder / "masks"), *CORRUPT])
    fork(train_qp.main, [data, "--vqm", vqm, "--out", str(folder / "g"), *QP])
    return data, volumes, vqm, str(folder / "g" / "qp.pt")


def scripts(data, volumes, vqm, qp):
    """The runs that are interrupted. -> {name: (main, argv)}"""
    guided = [data, *SSL, *GUIDED, "--qp", qp]
    return {
        "corrupt.py": (corrupt.main, [data, *CORRUPT]),
        "corrupt.py --workers 2": (corrupt.main, [data, *CORRUPT, "--workers", "2"]),
        "train_qp.py": (train_qp.main, [data, "--vqm", vqm, *QP]),
        "train_qp.py --head scalar": (
            train_qp.main,
            [
                data,
                "--vqm",
                vqm,
                *"--head scalar --width 8 --epochs 3 --batch 16 --per-image 20".split(),
            ],
        ),
        "train_ssl.py": (train_ssl.main, guided),
        "train_ssl.py --cache off --workers 2": (
            train_ssl.main,
            [*guided, "--cache", "off", "--workers", "2"],
        ),
        "train_ssl.py, volumes": (
            train_ssl.main,
            [
                volumes,
                *SSL[:2],
                "--size",
                "16,32,32",
                *SSL[4:],
                *"--steps 20 --eval-every 5".split(),
            ],
        ),
    }


def fork(main, argv, limit=None, wait=True):
    """Runs a script's main() in a process (and group) of its own, silently.

    -> its exit code, or without wait its number. limit: of the largest file, in bytes
    """
    child = os.fork()
    if not child:
        os.setsid()
        log = os.environ.get("SOAK_LOG", os.devnull)
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        for number in (1, 2):
            os.dup2(sys.stdout.fileno(), number)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
        try:
            cli(lambda: main(argv))
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if wait else child


def fingerprint(out):
    """What a run has made, but for times.

    -> {name: checksum} of every weight, log row, mask and report
    """
    found = {}

    def note(name, value):
        if isinstance(value, dict):
            for key, part in value.items():
                note(f"{name}/{key}", part)
        elif isinstance(value, (list, tuple)):
            note(name, dict(enumerate(value)))
        else:
            if torch.is_tensor(value):
                value = value.numpy()
            data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
            found[name] = hashlib.md5(data).hexdigest()

    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            note(name, {k: v for k, v in state.items() if k not in ("args", "seconds")})
        elif path.name == "log.csv":
            with open(path, newline="") as f:
                note(
                    name,
                    [
                        {k: v for k, v in row.items() if k not in ("ms", "seconds")}
                        for row in csv.DictReader(f)
                    ],
                )
        elif path.suffix == ".h5":
            with h5py.File(path) as f:
                note(
                    name,
                    {
                        k: np.asarray(v) if k not in ("classes", "command") else list(v)
                        for k, v in f.attrs.items()
                    },
                )
                for split, group in f.items():
                    for key, item in group.items():
                        texts = item.dtype == object
                        values = item.asstr()[:].tolist() if texts else item[:]
                        note(f"{name}/{split}/{key}", values)
        elif path.suffix == ".md":
            note(name, path.read_text())
    return found


def leftovers(group):
    """Processes of a killed run that still live after six seconds."""
    end = time.monotonic() + 6
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return []
        time.sleep(0.05)
    return [f"process group {group}"]


def interrupt(main, argv, out, number, delay, expected):
    """One run that gets a signal `delay` seconds after its start and then goes on.

    -> exit code of the first, and what is wrong with the second
    """
    shutil.rmtree(out, ignore_errors=True)
    child = fork(main, [*argv, "--out", str(out)], wait=False)
    time.sleep(delay)
    os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    wrong = leftovers(child)
    again = fork(main, [*argv, "--out", str(out), "--resume"])
    found = fingerprint(out) if out.exists() else {}
    wrong += [f"exit code {again} after --resume"] * (again != 0) + [
        f"left {p.name}" for p in out.rglob(".*.part")
    ]
    wrong += sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))[:3]
    return code, wrong


def soak(name, script, folder, kills, numbers, first=0.0):
    """Interrupts a run `kills` times with each signal at random moments.

    The earliest comes after a share `first` of the run's time. script: (main, argv)
    -> a row of the table for each signal
    """
    main, argv = script
    rng, out, rows = random.Random(name), folder / "run", []
    shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    if code := fork(main, [*argv, "--out", str(out)]):
        raise SystemExit(
            f"{name}: ends with {code} although nothing interrupts it; SOAK_LOG=FILE shows why"
        )
    length, expected = time.monotonic() - start, fingerprint(out)
    for number in numbers:
        ends, wrong, late = [], [], 0
        for _ in range(kills):
            code, faults = interrupt(
                main, argv, out, number, rng.uniform(first, 0.9) * length, expected
            )
            late += code == 0
            ends.append(code == 0 or code == (-9 if number == signal.SIGKILL else 128 + number))
            wrong += [faults] if faults else []
        rows.append(
            dict(
                run=name,
                signal=signal.Signals(number).name,
                sent=kills,
                late=late,
                ended=sum(ends),
                identical=kills - len(wrong),
                faults=wrong,
                items=len(expected),
                seconds=length,
            )
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def watch(name, script, folder, steps):
    """Resident memory and open files of a long run, at every log row. -> a row of the table"""
    main, argv = script
    out, seen = folder / "run", {}
    shutil.rmtree(out, ignore_errors=True)
    child = fork(
        main,
        [
            *argv,
            "--out",
            str(out),
            "--steps",
            str(steps),
            "--eval-every",
            str(max(1, steps // 40)),
            "--patience",
            "1000",
        ],
        wait=False,
    )
    process = psutil.Process(child)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        step = (
            len((out / "log.csv").read_text().splitlines()) - 1 if (out / "log.csv").exists() else 0
        )
        family = [process, *process.children(recursive=True)]
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            seen[step] = (
                sum(p.memory_info().rss for p in family),
                sum(p.num_fds() for p in family),
            )
        except psutil.Error:
            pass
        time.sleep(0.05)
    rows = np.array(
        [(s * max(1, steps // 40), *seen[s]) for s in sorted(seen) if s >= 10]
    )  # the first quarter warms up
    return dict(
        run=name,
        steps=steps,
        start=rows[0, 1] / 2**20,
        end=rows[-1, 1] / 2**20,
        slope=np.polyfit(rows[:, 0], rows[:, 1], 1)[0] / 1024,
        files=f"{rows[0, 2]} to {rows[-1, 2]}",
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--kills",
        type=int,
        default=20,
        help="moments for SIGKILL, and a quarter as many for SIGTERM and SIGINT",
    )
    p.add_argument(
        "--memory", type=int, metavar="STEPS", help="watch memory over so many steps instead"
    )
    p.add_argument("--only", default="", help="runs whose name holds this")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: run for name, run in scripts(*prepare(Path(folder))).items() if args.only in name
        }
        if args.memory:
            titles = "run | steps | MB at a quarter | MB at the end | slope, KB a step | open files"
            print(f"| {titles} |\n{'|---' * 6}|")
            for name, script in runs.items():
                if "train_ssl" in name:
                    row = watch(name, script, Path(folder), args.memory)
                    print(
                        f"| `{name}` | {row['steps']} | {row['start']:.0f} | {row['end']:.0f} "
                        f"| {row['slope']:+.3f} | {row['files']} |",
                        flush=True,
                    )
            return
        titles = "run | seconds | signal | sent | after its end | right exit code | identical"
        print(f"| {titles} | values compared |\n{'|---' * 8}|")
        for name, script in runs.items():
            few = max(1, args.kills // 4)
            for row in (
                *soak(name, script, Path(folder), args.kills, [signal.SIGKILL]),
                *soak(name, script, Path(folder), few, [signal.SIGTERM, signal.SIGINT]),
            ):
                print(
                    f"| `{row['run']}` | {row['seconds']:.1f} | {row['signal']} | {row['sent']} "
                    f"| {row['late']} | {row['ended']} of {row['sent']} "
                    f"| **{row['identical']} of {row['sent']}** | {row['items']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
