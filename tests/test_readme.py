"""The commands and examples of every README work as printed."""

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
import evaluate
import models
import train_qp
import train_ssl
from data import h5
from models import quality
from models.losses import one_hot

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "models" / "README.md", ROOT / "data" / "README.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = [  # words that tell the blocks of commands apart; a test below runs each
    "make demo",
    "corrupt.py runs/phantom.h5",
    "evaluate.py NEW ",
    "held_out",
    "--model unetpp",
    "corrupt.py mine.h5",
    "corrupt.py spleen.h5",
    "corrupt.py acdc.h5",
    "corrupt.py runs/volumes.h5",
    "--channels 2",
    "--regions",
    "data.figures",
    "xargs",
    "torchrun",
]
SMALL = {  # appended to a command, so that it ends in seconds; argparse takes the last value
    "data.phantom": "--train 8 --val 2 --test 1 --size 32 --depth 4",
    "data.ssl4mis": "--val 1",
    "corrupt.py": "--size 32 --masks 4 --val-masks 1 --patches 2 --harvest-epochs 1 "
    "--harvest-steps 1 --harvest-batch 16",
    "train_qp.py": "--size 32 --width 4 --members 1 --epochs 1 --per-image 1 --batch 8",
    "train_ssl.py": "--size 32 --width 4 --steps 2 --batch 2 --batch-unlabeled 2 --keep 1,2",
    "evaluate.py": "--pictures 1",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def block(word):
    """The one block of commands that holds a word."""
    (found,) = [b for b in blocks("bash") if word in b]
    return found


def commands(text):
    """The lines that call Python, without comments; lines that end in a backslash are joined."""
    return [
        line.split("#")[0].strip()
        for line in text.replace("\\\n", " ").split("\n")
        if line.startswith("python ")
    ]


def execute(command, folder, monkeypatch):
    """Runs a command's main() with its own arguments in a folder.

    Each script is also started as a process, in its own tests.
    """
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


def test_every_block_of_commands_is_run():
    assert len(blocks("bash")) == len(BLOCKS)
    for text in blocks("bash"):
        assert len([word for word in BLOCKS if word in text]) == 1, text


@pytest.mark.usefixtures("unrendered")
def test_the_four_stages_by_hand(tmp_path, monkeypatch, capsys):
    for word in ("corrupt.py runs/phantom.h5", "--regions", "data.figures", "held_out"):
        for command in commands(block(word)):
            execute(command, tmp_path, monkeypatch)
    out = capsys.readouterr().out
    following = [line for line in out.split("\n") if line.startswith("next: python ")]
    for line in following:  # what each script calls the next command is one
        words = shlex.split(line.split("    (")[0])[2:]
        importlib.import_module(words[0].removesuffix(".py")).parse_args(words[1:])
    scripts = {line.split()[2] for line in following}
    assert scripts == {"corrupt.py", "train_qp.py", "train_ssl.py", "evaluate.py"}
    assert (tmp_path / "runs" / "curves.png").exists()
    assert (tmp_path / "runs" / "estimates" / "estimates.png").exists()
    assert "expected Dice under a second network" in out
    assert "ventricles = left ventricle + right ventricle" in out
    assert "| mean_teacher + QW (pixel) |" in out and "| supervised |" in out


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(
    "word, said, made",
    [
        ("--channels 2", "2 channel(s): muscle as tissue, muscle as blood", ["two.png"]),
        (
            "corrupt.py runs/volumes.h5",
            "| mean_teacher + QW (pixel) |",
            ["masks3d.png", "new/masks/phantom010.nii.gz"],
        ),
    ],
)
def test_the_blocks_on_volumes(word, said, made, tmp_path, monkeypatch, capsys):
    for command in commands(block(word)):
        execute(command, tmp_path, monkeypatch)
    assert said in capsys.readouterr().out
    assert all((tmp_path / "runs" / name).exists() for name in made)


@pytest.mark.usefixtures("unrendered")
def test_converters(tmp_path, monkeypatch):
    """The commands of the first page that make datasets, each from the files that it names."""
    from test_data import make_ssl4mis
    from test_nifti import make

    make_pictures(tmp_path / "MINE", 8)
    make(tmp_path / "Task09_Spleen", list("abcd"))
    make_ssl4mis(tmp_path / "ACDC", range(10, 17))
    *lines, _ = commands(block("evaluate.py NEW "))
    assert len(lines) == 4
    for line in lines:
        execute(line, tmp_path, monkeypatch)
    assert (tmp_path / "mine.png").exists()


def test_new_images(gray, gray_quality, tmp_path, monkeypatch):
    """The command for new images, with a folder of volumes as NEW."""
    from test_evaluate import make_run
    from test_nifti import make

    make(tmp_path / "src", ["a", "b"], shape=(4, 40, 44))
    (tmp_path / "src" / "imagesTr").rename(tmp_path / "NEW")
    make_run(tmp_path / "runs" / "mt_qw", h5.read_info(gray)), (tmp_path / "runs" / "qp").mkdir()
    shutil.copy(gray_quality[1], tmp_path / "runs" / "qp" / "qp.pt")
    *_, command = commands(block("evaluate.py NEW "))
    execute(command, tmp_path, monkeypatch)
    assert sorted(p.name for p in (tmp_path / "runs" / "new" / "masks").iterdir()) == [
        "a.nii.gz",
        "b.nii.gz",
    ]
    assert (tmp_path / "runs" / "new" / "worst_first.csv").exists()


def test_chinese_readme_has_the_same_commands_and_tables():
    page = (ROOT / "README.zh.md").read_text()
    fenced = r"```(?:bash|python)\n.*?```"
    assert re.findall(fenced, page, re.S) == re.findall(fenced, README, re.S)
    numbers = r"^\| [a-z_]+ \| \d.*$"  # the rows of the measured table
    assert re.findall(numbers, page, re.M) == re.findall(numbers, README, re.M)
    options = r"`(--[^`]+)` \|$"
    assert re.findall(options, page, re.M) == re.findall(options, README, re.M)


def test_the_measured_rows_are_those_of_their_page():
    rows = re.findall(r"^\| [a-z_]+ \| \d.*$", README, re.M)
    page = (ROOT / "results" / "baselines" / "README.md").read_text()
    assert len(rows) == 5
    assert all(row in page.split("at the last step\n")[1].split("\n") for row in rows)


def test_pages_fit_a_screen():
    """README has 200 lines at most, and prose has 100 columns. Tables may be wider."""
    assert len(README.splitlines()) <= 200
    for page in [*PAGES, ROOT / "README.zh.md", ROOT / "METHOD.md"]:
        for n, line in enumerate(page.read_text().splitlines(), 1):
            assert len(line) <= 100 or line.startswith(("|", "$$")), (page.name, n)


def test_the_method_quotes_the_code():
    """Every line of code in METHOD.md stands in the file that is named above it."""
    quoted = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "METHOD.md").read_text(), re.S)
    assert len(quoted) == 15
    for path, text in quoted:
        code = " ".join((ROOT / path).read_text().split())
        assert " ".join(text.split()) in code, (path, text)


def test_the_map_names_what_is_there():
    table = README.split("| what | where |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert len(named) > 5
    assert named <= vars(train_ssl).keys() | vars(models).keys() | vars(quality).keys()


def test_one_step_computes_the_loss(tmp_path):
    """The excerpt of a step gives what total_loss() gives."""
    method, step = example("METHODS[args.method]").split("\n\n")
    command = "DATA.h5 --method mean_teacher --weight quality --weight-level image --qp qp.pt"
    options = ["--qar", "1", "--qar-share", "1", "--weight-threshold", "0"]
    args = train_ssl.parse_args([*command.split(), "--out", str(tmp_path), *options])
    torch.manual_seed(0)
    net = models.build("unet", channels=1, classes=3, width=4)
    teacher = models.build("unet", channels=1, classes=3, width=4).eval()
    g = models.build("quality_dense", channels=1, classes=3, width=4, members=1).eval()
    x, u, s1 = torch.randn(3, 2, 1, 32, 32)
    y = one_hot(torch.randint(3, (2, 32, 32)), 3)
    batch = train_ssl.Batch(x, y, u, s1, s1)
    names = dict(vars(train_ssl), nets=[net], teacher=teacher, g=g, batch=batch, args=args, t=1)
    names.update(lam=args.lam, lam_qar=args.qar)
    exec(method, names)
    names["METHODS"] = dict(mean_teacher=names["mean_teacher"])
    torch.manual_seed(1)
    exec(step, names)
    torch.manual_seed(1)
    end = train_ssl.now_at(args, args.steps + 1)
    loss, _ = train_ssl.total_loss([net], teacher, g, batch, args, end)
    assert torch.equal(names["loss"], loss)


@pytest.mark.usefixtures("unrendered")
def test_networks(tmp_path, monkeypatch, capsys):
    """The commands, with the file that the second one names; the table has each network's size."""
    from test_networks import swin_t

    torch.save({"model": swin_t()}, tmp_path / "swin_tiny_patch4_window7_224.pth")
    monkeypatch.setitem(SMALL, "train_ssl.py", "--width 12 --steps 2 --batch 3 --size 32")
    execute("python -m data.phantom --out runs/phantom.h5", tmp_path, monkeypatch)
    lines = commands(block("--model unetpp"))
    for line in lines:
        execute(line, tmp_path, monkeypatch)
    assert capsys.readouterr().out.count("best.pt, last.pt") == len(lines) == 2
    rows = {
        row[1]: row[3] for row in (line.split("|") for line in TEXT.split("\n")) if len(row) == 8
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
    """Programs that only note how they were called, in folder/calls.txt.

    -> the environment that finds them first
    """
    (folder / "bin").mkdir()
    for name in names:
        (folder / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $@" >> {folder}/calls.txt\n')
        (folder / "bin" / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


def test_sweeps(tmp_path, monkeypatch, capsys):
    """The shell hands each line's options to a run, by xargs and by GNU parallel, if it is there.

    The runs are one table, and stay as they are.
    """
    monkeypatch.chdir(tmp_path)
    env, script = stubs(tmp_path, "python"), block("xargs")
    (tmp_path / "runs" / "sweep").mkdir(parents=True)
    subprocess.run(["bash", "-eu"], input=script, text=True, env=env, check=True)
    *runs, table = (tmp_path / "calls.txt").read_text().split("\n")[:-1]
    assert len(runs) == 4 and all(
        run.startswith("python train_ssl.py runs/phantom.h5 --resume --method ") for run in runs
    )
    if shutil.which("parallel"):
        (tmp_path / "calls.txt").unlink()
        (lines,) = blocks("sh")
        script = lines[: lines.index("sbatch")]
        assert script.startswith("parallel")
        subprocess.run(["bash", "-eu"], input=script, text=True, env=env, check=True)
        assert sorted((tmp_path / "calls.txt").read_text().split("\n")[:-1]) == sorted(runs)
    execute("python data.phantom --out runs/phantom.h5", tmp_path, monkeypatch)
    for _ in range(2):
        for run in runs:
            execute(run, tmp_path, monkeypatch)
    assert capsys.readouterr().out.count("this run is finished") == 4
    execute(commands(block("xargs"))[-1], tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert (
        table.startswith("python evaluate.py runs/phantom.h5 runs/sweep/")
        and "| mean_teacher |" in out
        and " ± " in out
    )


def test_torchrun(tmp_path):
    """torchrun and train_ssl.py take its options (tests/test_distributed.py runs it)."""
    words = shlex.split(block("torchrun").replace("\\\n", " "))
    assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node=2", "train_ssl.py"]
    assert train_ssl.parse_args(words[4:]).batch == 16


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("results/*/*.md")]
    assert len(pages) > 15
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if "://" in link:
                continue
            path, _, section = link.partition("#")
            target = page.parent / path if path else page
            assert target.stat().st_size > 0, (page, link)
            if section:
                titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
                anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
                assert section in anchors, (page, link)


@pytest.mark.usefixtures("unrendered")
def test_own_data(tmp_path, monkeypatch):
    """The three recipes, from data as a user has them to the table and to masks of new images."""
    from test_data import make_ssl4mis
    from test_nifti import make as make_nifti
    from test_volumes import make_la

    make_pictures(tmp_path / "MINE", 34), make_pictures(tmp_path / "new", 2, seed=1)
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
        ("corrupt.py mine.h5", "python -m data.images --preset ph2 PH2Dataset --out ph2.h5"),
        ("corrupt.py spleen.h5", None),
        ("corrupt.py acdc.h5", None),
    ):
        for line in [*commands(block(word)), *([command] if command else [])]:
            execute(line, tmp_path, monkeypatch)
    for name, n in (("mine", 34), ("ph2", 3), ("acdc", 8), ("la", 3), ("spleen", 8)):
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
    } <= set(train_ssl.METHODS)
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
    left_atrium = re.search(r"`(--optimizer sgd [^`]+6000)`", TEXT).group(1)
    assert train_ssl.parse_args(["DATA.h5", "--out", "RUN", *left_atrium.split()]).lr == 0.01


def example(word):
    return next(b for b in blocks("python") if word in b)


def test_example_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(example("h5.write"), {})
    assert len(h5.read_info("mine.h5").entries("train")) == 4


def test_example_method(gray, gray_quality, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ssl, "METHODS", dict(train_ssl.METHODS))
    text = example('METHODS["')
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


@pytest.mark.parametrize(
    "word, name, weights", [("WideUNet", "wide_unet", 7_000_000), ("Tiny", "tiny", 100)]
)
def test_example_network(word, name, weights, gray, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    exec(example(f"class {word}"), vars(models) | {"nn": nn})
    options = "--labeled 2 --size 32 --steps 2 --batch 2".split()
    train_ssl.main([gray, "--out", str(tmp_path), "--model", name, *options])
    model = torch.load(tmp_path / "best.pt", weights_only=True)["model"]
    assert model["name"] == name
    assert models.parameters(models.build(**model)) > weights


def test_example_of_what_a_method_learns_and_remembers(gray, tmp_path, monkeypatch):
    """It is trained, resumed to the same weights, and in the way of nobody who scores f."""
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    exec(example("class Projected"), vars(models) | {"nn": nn, "torch": torch})

    def prototypes(nets, teacher, batch, args, t):
        target = batch.pseudo_label(train_ssl.probabilities(teacher, batch.u))
        features = nets[0].project(nets[0].encode(batch.u)[2].mean((2, 3))).float()  # [U, 32]
        nets[0].bank.lerp_(features.detach().mean(0), 0.1)
        distance = (features[:, None] - nets[0].bank).square().mean((1, 2))  # [U]
        loss = lambda w: train_ssl.weighted_mean(distance[:, None, None].expand_as(w), w)
        return train_ssl.seg_loss(nets[0](batch.x), batch.y), [train_ssl.Term(target, loss)]

    monkeypatch.setitem(train_ssl.METHODS, "prototypes", prototypes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = "--labeled 2 --size 32 --steps 2 --batch 2 --batch-unlabeled 2 --eval-every 1"
    how = ["--method", "prototypes", "--model", "projected", "--lam-warmup", "0", *options.split()]
    train_ssl.main([gray, "--out", str(whole), *how, "--keep", "1"])
    parts.mkdir()
    (parts / "last.pt").write_bytes((whole / "step1.pt").read_bytes())
    (parts / "log.csv").write_bytes((whole / "log.csv").read_bytes())
    train_ssl.main([gray, "--out", str(parts), *how, "--keep", "1", "--resume"])
    states = [torch.load(path / "last.pt", weights_only=True)["nets"][0] for path in (whole, parts)]
    start = torch.load(whole / "step1.pt", weights_only=True)["nets"][0]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
    for name in ("project.weight", "bank"):
        assert not torch.equal(states[0][name], start[name])
    table = ["--out", str(tmp_path / "table"), "--pictures", "0"]
    evaluate.main([gray, str(whole / "best.pt"), *table])


def test_example_input_of_g(gray, gray_quality, tmp_path, monkeypatch):
    """Stage 2 trains a g that sees edges; stage 3 loads it, and asks it."""
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    exec(example("class WithEdges"), vars(models) | {"torch": torch})
    options = "--size 32 --width 4 --members 1 --epochs 1".split()
    train_qp.main([gray, "--vqm", gray_quality[0], "--out", str(tmp_path / "qp"), *options])
    g = torch.load(tmp_path / "qp" / "qp.pt", weights_only=True)
    assert g["model"]["channels"] == 1
    first = next(w for w in g["weights"].values() if w.dim() == 4)
    assert first.shape[1] == 1 + 1 + 4  # image, edges, the mask's classes
    options = "--labeled 2 --size 32 --steps 2 --batch 2 --batch-unlabeled 2 --lam-warmup 0".split()
    guided = ["--method", "mean_teacher", "--weight", "quality", "--qar", "0.01"]
    qp = ["--qp", str(tmp_path / "qp" / "qp.pt")]
    train_ssl.main([gray, "--out", str(tmp_path / "ssl"), *guided, *qp, *options])


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("target", ["demo", "demo3d"])
def test_make_demo_in_miniature(target, tmp_path, monkeypatch, capsys):
    """The commands of a demo, one after another, each shrunk; the real ones take minutes."""
    monkeypatch.setitem(SMALL, "data.phantom", SMALL["data.phantom"] + " --unlabeled 6")
    recipe = subprocess.run(
        ["make", "-n", target, f"FOLDER={tmp_path}", "-o", ".venv/ready"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = [
        line.split(" > ")[0]
        for line in recipe.stdout.replace("\\\n", " ").split("\n")
        if line.startswith(".venv/bin/python")
    ]
    assert len(lines) == 10
    for line in lines:
        execute(line, ROOT, monkeypatch)
    table = capsys.readouterr().out
    rows = "supervised", "fixmatch", "fixmatch + QW + correction"
    assert all(f"| {row} | 4 |" in table for row in rows)
    assert "| supervised | all" in table
    assert "Dice of unseen patients, %: supervised " in table and "\nGuidance: " in table
