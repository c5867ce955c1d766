"""README's commands and examples work as printed."""

import glob
import importlib
import os
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, make_pictures
from torch import nn

import corrupt
import models
import train_ssl
from data import h5

README = (ROOT / "README.md").read_text()
SMALL = {  # appended to a command, so that it ends in seconds; argparse takes the last value
    "data.phantom": "--train 8 --val 2 --test 1 --size 32 --depth 4",
    "data.ssl4mis": "--val 1",
    "corrupt.py": "--size 32 --masks 8 --val-masks 2 --harvest-epochs 1 --harvest-steps 1 --harvest-batch 4",
    "train_qp.py": "--size 32 --width 4 --members 1 --epochs 1",
    "train_ssl.py": "--size 32 --width 4 --steps 2 --batch 3 --batch-unlabeled 3 --keep 1,2",
    "evaluate.py": "--pictures 1",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands(text):
    return [
        line.split("#")[0].strip()
        for line in text.replace("\\\n", " ").split("\n")
        if line.startswith("python ")
    ]


def execute(command, folder, monkeypatch):
    """Runs a command's main() with its own arguments in a folder (each script is also started as a process, in its own tests)."""
    monkeypatch.chdir(folder)
    words = [
        w
        for word in shlex.split(command)[1:]
        for w in (sorted(glob.glob(word)) if "*" in word else [word])
    ]
    if words[0] == "-m":
        words.pop(0)
    name = words.pop(0)
    small = SMALL.get(name, "").replace(
        "--size 32", "--size 16" if re.search(r"--size \d+,", command) else "--size 32"
    )  # a patch of volumes: smaller still
    importlib.import_module(name.removesuffix(".py")).main(words + small.split())


@pytest.mark.usefixtures("unrendered")
def test_the_four_stages_by_hand(tmp_path, monkeypatch, capsys):
    for block in (
        next(b for b in blocks("bash") if word in b)
        for word in ("corrupt.py", "data.figures", "held_out")
    ):
        for command in commands(block):
            execute(command, tmp_path, monkeypatch)
    out = capsys.readouterr().out
    for line in [
        line for line in out.split("\n") if line.startswith("next: python ")
    ]:  # what each script calls the next command is one
        words = shlex.split(line.split("    (")[0])[2:]
        importlib.import_module(words[0].removesuffix(".py")).parse_args(words[1:])
    assert {line.split()[2] for line in out.split("\n") if line.startswith("next: ")} == {
        "corrupt.py",
        "train_qp.py",
        "train_ssl.py",
        "evaluate.py",
    }
    assert (tmp_path / "runs" / "curves.png").exists()
    assert (
        "expected Dice under a second network" in out
        and (tmp_path / "runs" / "estimates" / "estimates.png").exists()
    )
    assert (
        "| mean_teacher + QW (pixel) |" in out
        and "| supervised |" in out
        and (tmp_path / "runs" / "masks.png").exists()
    )


@pytest.mark.usefixtures("unrendered")
def test_the_stages_of_volumes(tmp_path, monkeypatch, capsys):
    for command in commands(next(b for b in blocks("bash") if "--dims 3" in b)):
        execute(command, tmp_path, monkeypatch)
    assert (
        "| mean_teacher + QW (pixel) |" in capsys.readouterr().out
        and (tmp_path / "runs" / "masks3d.png").exists()
    )
    assert [p.name for p in (tmp_path / "runs" / "new" / "masks").iterdir()] == [
        "phantom010.nii.gz"
    ]


def test_new_images(gray, gray_quality, tmp_path, monkeypatch):
    """The command for new images, with a folder of volumes as NEW."""
    from test_evaluate import make_run
    from test_nifti import make

    make(tmp_path / "src", ["a", "b"], shape=(4, 40, 44))
    (tmp_path / "src" / "imagesTr").rename(tmp_path / "NEW")
    make_run(tmp_path / "runs" / "mt_qw", h5.read_info(gray)), (tmp_path / "runs" / "qp").mkdir()
    shutil.copy(gray_quality[1], tmp_path / "runs" / "qp" / "qp.pt")
    (command,) = commands(next(b for b in blocks("bash") if "evaluate.py NEW " in b))
    execute(command, tmp_path, monkeypatch)
    assert sorted(p.name for p in (tmp_path / "runs" / "new" / "masks").iterdir()) == [
        "a.nii.gz",
        "b.nii.gz",
    ]
    assert (tmp_path / "runs" / "new" / "worst_first.csv").exists()


def test_chinese_readme_has_the_same_commands():
    """And every block of them that it should have: the first screen, the stages, new images, the three recipes."""
    theirs = re.findall(r"```bash\n(.*?)```", (ROOT / "README.zh.md").read_text(), re.S)
    assert len(theirs) == 6 and all(block in blocks("bash") for block in theirs)


def test_the_method_quotes_the_code():
    """Every line of code in METHOD.md stands in the file that is named above it."""
    quoted = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "METHOD.md").read_text(), re.S)
    assert len(quoted) == 13
    for path, text in quoted:
        assert text in (ROOT / path).read_text(), (path, text)


@pytest.mark.usefixtures("unrendered")
def test_networks(tmp_path, monkeypatch, capsys):
    """The commands, with the file that the second one names; and the table has every network, with its size."""
    from test_networks import swin_t

    torch.save({"model": swin_t()}, tmp_path / "swin_tiny_patch4_window7_224.pth")
    monkeypatch.setitem(SMALL, "train_ssl.py", "--width 12 --steps 2 --batch 3 --size 32")
    execute("python -m data.phantom --out runs/phantom.h5", tmp_path, monkeypatch)
    lines = commands(next(b for b in blocks("bash") if "--model unetpp" in b))
    for line in lines:
        execute(line, tmp_path, monkeypatch)
    assert capsys.readouterr().out.count("best.pt, last.pt") == len(lines) == 2
    rows = {
        row[1]: row[3] for row in (line.split("|") for line in README.split("\n")) if len(row) == 8
    }
    for name in models.segmentation_networks():
        with torch.device("meta"):
            size = (
                ""
                if name == "smp:*"
                else f"{models.parameters(models.build(name, channels=3, classes=2)) / 1e6:.1f}"
            )
        assert rows[f" `{name.replace('*', 'NAME')}` "].strip() == size


def stubs(folder, *names):
    """Programs that only note how they were called, in folder/calls.txt. -> the environment that finds them first"""
    (folder / "bin").mkdir()
    for name in names:
        (folder / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $@" >> {folder}/calls.txt\n')
        (folder / "bin" / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


def test_sweeps(tmp_path, monkeypatch, capsys):
    """The shell hands every line's options to a run, through xargs and, where it is installed, GNU parallel; the runs are one table, and stay as they are."""
    monkeypatch.chdir(tmp_path)
    env, block = stubs(tmp_path, "python"), next(b for b in blocks("bash") if "xargs" in b)
    (tmp_path / "runs" / "sweep").mkdir(parents=True)
    subprocess.run(["bash", "-eu"], input=block, text=True, env=env, check=True)
    *runs, table = (tmp_path / "calls.txt").read_text().split("\n")[:-1]
    assert len(runs) == 4 and all(
        run.startswith("python train_ssl.py runs/phantom.h5 --resume --method ") for run in runs
    )
    if shutil.which("parallel"):
        (tmp_path / "calls.txt").unlink()
        subprocess.run(
            ["bash", "-eu"],
            input=next(
                line for b in blocks("sh") for line in b.split("\n") if line.startswith("parallel")
            ),
            text=True,
            env=env,
            check=True,
        )
        assert sorted((tmp_path / "calls.txt").read_text().split("\n")[:-1]) == sorted(runs)
    execute("python data.phantom --out runs/phantom.h5", tmp_path, monkeypatch)
    for _ in range(2):
        for run in runs:
            execute(run, tmp_path, monkeypatch)
    assert capsys.readouterr().out.count("this run is finished") == 4
    execute(
        "python evaluate.py runs/phantom.h5 runs/sweep/*/best.pt --baseline supervised --out runs/sweep_table",
        tmp_path,
        monkeypatch,
    )
    out = capsys.readouterr().out
    assert (
        table.startswith("python evaluate.py runs/phantom.h5 runs/sweep/")
        and "| mean_teacher |" in out
        and " ± " in out
    )


def test_torchrun(tmp_path):
    """Its command is one that torchrun and train_ssl.py take (tests/test_distributed.py runs it)."""
    command = shlex.split(
        next(line for b in blocks("bash") for line in b.split("\n") if line.startswith("torchrun"))
    )
    assert (
        command[:4] == ["torchrun", "--standalone", "--nproc_per_node=2", "train_ssl.py"]
        and train_ssl.parse_args(command[4:]).batch == 16
    )


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("results/**/*.md")]
    assert len(pages) > 10
    for page in pages:
        links = [
            link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link
        ]
        assert all((page.parent / link).stat().st_size > 0 for link in links), page


@pytest.mark.usefixtures("unrendered")
def test_own_data(tmp_path, monkeypatch):
    """The three recipes, each as a user has the data on disk, from the folder to the table and to masks of new images."""
    from test_data import make_ssl4mis
    from test_nifti import make as make_nifti
    from test_volumes import make_la

    make_pictures(tmp_path / "MINE", 26), make_pictures(tmp_path / "new", 2, seed=1)
    (tmp_path / "new" / "images").rename(tmp_path / "NEW_PICTURES")
    (
        make_ssl4mis(tmp_path / "ACDC", range(10, 17)),
        make_la(tmp_path / "LA").joinpath("val.list").unlink(),
        make_nifti(tmp_path / "Task09_Spleen", list("abcdefg")),
    )
    make_nifti(tmp_path / "Task09_Spleen", ["x"], tr="Ts", labels=False)
    for name, p in (("IMD001", 1), ("IMD002", 2), ("IMD003", 3)):
        src = make_pictures(tmp_path / "tmp" / name, 1, seed=p)
        for kind, suffix in (("images", "_Dermoscopic_Image"), ("masks", "_lesion")):
            folder = tmp_path / "PH2Dataset" / name / f"{name}{suffix}"
            folder.mkdir(parents=True)
            (src / kind / "p0.png").rename(folder / f"{name}.png")
    for word, command in (
        ("data.images MINE", "python -m data.images --preset ph2 PH2Dataset --out ph2.h5"),
        ("data.nifti Task09", None),
        ("data.ssl4mis", None),
    ):
        for line in [
            *commands(next(b for b in blocks("bash") if word in b)),
            *([command] if command else []),
        ]:
            execute(line, tmp_path, monkeypatch)
    for name, n in (("mine", 26), ("ph2", 3), ("acdc", 8), ("la", 3), ("spleen", 8)):
        info = h5.read_info(tmp_path / f"{name}.h5")
        assert sum(len(e) for e in info.splits.values()) == n
    for name, mask in (("mine", "p0.png"), ("spleen", "x.nii.gz")):
        assert (tmp_path / "runs" / name / "new" / "masks" / mask).exists() and (
            tmp_path / "runs" / name / "new" / "worst_first.csv"
        ).exists()
        guided = "QW + correction" if name == "mine" else "QW (pixel)"
        assert (
            f"| mean_teacher + {guided} |"
            in (tmp_path / "runs" / name / "table" / "summary.md").read_text()
        )


def test_rows_of_the_paper_parse(tmp_path):
    rows = re.findall(r"^\| ([^|]+) \| `(--method [^`]+)` \|$", README, re.M)
    names = [name.split(",")[0] for name, _ in rows]
    assert names[:14] == [
        "SUP",
        "PL-T",
        "PL-C",
        "MT",
        "UA-MT",
        "ICT",
        "CPS",
        "CL",
        "PL-QW",
        "MT-QW",
        "ICT-QW",
        "CPS-QW",
        "CL-QW",
        "QAR",
    ]
    assert {
        train_ssl.parse_args(["DATA.h5", "--out", "RUN", *options.split()]).method
        for _, options in rows
    } == set(train_ssl.METHODS)
    for name, options in rows:
        args = train_ssl.parse_args(["DATA.h5", "--out", "RUN", "--labeled", "7", *options.split()])
        assert (args.weight == "quality") == ("QW" in name) and (args.qar > 0) == ("QAR" in name)
        if name.startswith("PL-C"):
            assert (args.weight_threshold, args.weight_power, args.conf_threshold) == (
                0.9,
                2.0,
                0.0,
            )
        if name == "PL-QW":
            assert (args.weight_threshold, args.weight_power, args.conf_threshold) == (
                0.5,
                2.0,
                0.0,
            )
    left_atrium = re.search(r"`(--optimizer sgd [^`]+6000)`", README).group(1)
    assert train_ssl.parse_args(["DATA.h5", "--out", "RUN", *left_atrium.split()]).lr == 0.01
    usual = re.search(r"`(--optimizer sgd [^`]+30000)`", README.replace("\n", " ")).group(1)
    assert train_ssl.parse_args(["DATA.h5", "--out", "RUN", *usual.split()]).steps == 30000


def example(word):
    return next(b for b in blocks("python") if word in b)


def test_example_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(example("h5.write"), {})
    assert len(h5.read_info("mine.h5").entries("train")) == 4


def test_example_method(gray, gray_quality, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ssl, "METHODS", dict(train_ssl.METHODS))
    text = example("METHODS[")
    assert len(text.strip().split("\n")) <= 15
    exec(text, vars(train_ssl))
    for hooks in (
        [],
        [
            "--weight",
            "quality",
            "--weight-level",
            "class",
            "--qar",
            "0.01",
            "--qp",
            gray_quality[1],
        ],
    ):
        train_ssl.main(
            [
                gray,
                "--out",
                str(tmp_path / str(len(hooks))),
                "--method",
                "entropy",
                "--labeled",
                "2",
                "--size",
                "32",
                "--steps",
                "2",
                "--batch",
                "2",
                "--batch-unlabeled",
                "2",
                *hooks,
            ]
        )
    del train_ssl.entropy


def test_example_corruption(gray, tmp_path, monkeypatch):
    monkeypatch.setattr(corrupt, "SINGLE", list(corrupt.SINGLE))
    exec(example("SINGLE.append"), vars(corrupt))
    corrupt.main(
        [
            gray,
            "--out",
            str(tmp_path),
            "--labeled",
            "2",
            "--size",
            "32",
            "--masks",
            "200",
            "--val-masks",
            "1",
            "--harvest-epochs",
            "1",
            "--harvest-steps",
            "1",
            "--harvest-share",
            "0",
            "--no-balance",
        ]
    )
    with h5.open_file(tmp_path / "vqm.h5") as f:
        assert "mirror" in set(f["train/source"].asstr()[:])
    del corrupt.mirror


def test_example_network(gray, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    exec(example("NETWORKS["), {"nn": nn, "NETWORKS": models.NETWORKS})
    train_ssl.main(
        [
            gray,
            "--out",
            str(tmp_path),
            "--model",
            "tiny",
            "--labeled",
            "2",
            "--size",
            "32",
            "--steps",
            "2",
            "--batch",
            "2",
        ]
    )
    assert torch.load(tmp_path / "best.pt", weights_only=True)["model"]["name"] == "tiny"


@pytest.mark.usefixtures("unrendered")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
@pytest.mark.parametrize(
    "target, count, rows",
    [
        (
            "demo",
            13,
            (
                "pseudo_label + QW (class)",
                "pseudo_label + QW + correction",
                "mean_teacher + QW + correction",
                "supervised + QAR",
            ),
        ),
        (
            "demo3d",
            11,
            (
                "supervised",
                "mean_teacher",
                "mean_teacher + QW (class)",
                "ua_mt + QW (class)",
                "supervised + QAR",
            ),
        ),
    ],
)
def test_make_demo_in_miniature(target, count, rows, tmp_path, monkeypatch, capsys):
    """The recipe of `make demo`, line by line, each shrunk; the real one takes minutes."""
    recipe = subprocess.run(
        ["make", "-n", target, f"OUT={tmp_path}/demo", "-o", ".venv/ready"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = [
        line
        for line in recipe.stdout.replace("\\\n", " ").split("\n")
        if line.startswith(".venv/bin/python")
    ]
    assert len(lines) == count
    for line in lines:
        words = [
            w
            for pattern in shlex.split(line)
            for w in (sorted(glob.glob(pattern)) if "*" in pattern else [pattern])
        ]
        execute(shlex.join(words), ROOT, monkeypatch)
    table = capsys.readouterr().out
    assert all(f"| {row} |" in table for row in rows)
