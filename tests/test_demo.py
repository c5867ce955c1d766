"""What the demo says in plain words, from tables that are made up."""

import json
import os
import subprocess

import pytest
from conftest import ROOT

import train_qp
import train_ssl
from data import tables
from results.demo import conclusion, distillation

RUNS = {  # Dice of two classes, of four patients
    ("supervised", "2"): (0.60, 0.62, 0.58, 0.64),
    ("fixmatch", "2"): (0.70, 0.71, 0.69, 0.74),
    ("fixmatch + QW", "2"): (0.80, 0.82, 0.78, 0.84),
    ("supervised", "all"): (0.90, 0.91, 0.89, 0.94),
}


def table(folder, runs, r=None):
    """The files of evaluate.py. Class a has .05 less than a run's Dice, class b .05 more."""
    rows = []
    for (run, labeled), dice in runs.items():
        for i, value in enumerate(dice):
            for name, off in (("a", -0.05), ("b", 0.05)):
                row = {"run": run, "labeled": labeled, "case": f"c{i}", "patient": f"p{i}"}
                rows.append(row | {"class": name, "dice": value + off})
    tables.write_csv(str(folder / "cases.csv"), rows)
    if r:
        present = [{"run": "fixmatch", "estimate": "g", "Pearson": 0.1}]
        present += [{"run": "mean of all", "estimate": k, "Pearson": v} for k, v in r.items()]
        (folder / "quality.json").write_text(json.dumps({"levels": {"present": present}}))
    return folder


def said(folder, capsys):
    conclusion.main([str(folder)])
    return capsys.readouterr().out.splitlines()


def test_conclusion_of_a_made_up_table(tmp_path, capsys):
    """Every patient gains ten points, so the interval of the mean is as narrow as that."""
    r = {"g": 0.88, "mean confidence": 0.61, "f's own expected Dice": 0.71, "broken": None}
    first, unlabeled, guidance, quality = said(table(tmp_path, RUNS, r), capsys)
    assert first == (
        "Dice of unseen patients, %: supervised 61.0, fixmatch 71.0, fixmatch + QW 81.0, "
        "all labels 91.0."
    )
    assert unlabeled.startswith("Unlabeled images: +10.0 [9.2")
    assert guidance.startswith("Guidance: +10.0 [9.2")
    assert guidance.endswith("] over the same method without it.")
    assert quality == (
        "g tells good masks from bad ones: r = 0.88; the best without g: r = 0.71 "
        "(f's own expected Dice)."
    )


@pytest.mark.parametrize(
    "dice, words",
    [
        ((0.71, 0.70, 0.70, 0.73), "it: no gain that can be told from chance."),
        ((0.60, 0.61, 0.59, 0.64), "Guidance: -10.0 [-10.0, -10.0] over the same method"),
        ((0.60, 0.61, 0.59, 0.64), "it: a loss."),
    ],
)
def test_no_gain_is_said(dice, words, tmp_path, capsys):
    lines = said(table(tmp_path, RUNS | {("fixmatch + QW", "2"): dice}), capsys)
    assert words in lines[2]
    assert len(lines) == 3  # without quality.json, nothing of g


def test_a_g_behind_is_said(tmp_path, capsys):
    lines = said(table(tmp_path, RUNS, {"g": 0.41, "region confidence": 0.62}), capsys)
    assert lines[3] == (
        "g trails a simpler estimate: r = 0.41; the best without g: r = 0.62 (region confidence)."
    )


def test_g_and_f_together_are_no_estimate_without_g(tmp_path, capsys):
    r = {"g": 0.7, "g and f together": 0.8, "f's own expected Dice": 0.65}
    assert said(table(tmp_path, RUNS, r), capsys)[3] == (
        "g tells good masks from bad ones: r = 0.70, together with f 0.80; the best without g: "
        "r = 0.65 (f's own expected Dice)."
    )
    conclusion.main([str(tmp_path)] * 2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("| 0.70 ± 0.00 | 0.80 ± 0.00 | 0.65 ± 0.00 |")


def test_a_missing_run_is_named(tmp_path, capsys):
    runs = {key: dice for key, dice in RUNS.items() if key[1] != "all" and "QW" not in key[0]}
    first, unlabeled, missing = said(table(tmp_path, runs), capsys)
    assert first == "Dice of unseen patients, %: supervised 61.0, fixmatch 71.0."
    assert missing == "The table has no run of: the method guided, all labels."


def test_tables_with_another_story_are_refused(tmp_path, refused):
    both = RUNS | {("mean_teacher", "2"): (0.5, 0.5, 0.5, 0.5)}
    refused(conclusion.main, [table(tmp_path, both)], "mean_teacher", "fixmatch", "one of them")
    refused(conclusion.main, [tmp_path / "nothing"], "nothing", "--out of evaluate.py")


def test_how_many_foreign_patients_come_first(tmp_path, capsys):
    sources = ["foreign: cut", "", "foreign: body", "", "foreign: body"]
    rows = [{"rank": i, "source": f"seed 0{source}"} for i, source in enumerate(sources)]
    tables.write_csv(str(tmp_path / "worst_first.csv"), rows)
    conclusion.main([str(table(tmp_path, RUNS)), "--new", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "New images: 3 of 5 patients are foreign; 2 of these are among the first 3 of the list, "
        "worst first."
    )


def test_several_demos_make_a_table(tmp_path, capsys):
    folders = [tmp_path / name for name in "ab"]
    for folder, g in zip(folders, (0.5, 0.6)):
        folder.mkdir()
        table(folder, RUNS, {"g": g, "region confidence": 0.55})
    conclusion.main([str(folder) for folder in folders])
    head, _, first, second, mean = capsys.readouterr().out.strip().splitlines()
    cells = ["supervised", "fixmatch", "fixmatch + QW", "all labels", "r of g", "best r without g"]
    assert head == "| table | " + " | ".join(cells) + " |"
    assert first == f"| {folders[0]} | 61.00 | 71.00 | 81.00 | 91.00 | 0.50 | 0.55 |"
    assert second.endswith("| 0.60 | 0.55 |")
    assert mean.endswith("| 91.00 ± 0.00 | 0.55 ± 0.07 | 0.55 ± 0.00 |")


def make(folder, *options):
    """Makes the demo with a stand-in for Python, which writes its arguments down."""
    python = folder / "python"
    python.write_text(
        'echo "$@" >> "$(dirname "$0")/calls"\n'
        'case "$*" in *"$BROKEN"*) echo no luck; exit 1;; esac\n'
        'echo "| run |"\n'
    )
    (folder / "calls").write_text("")
    command = ["make", "demo", "-o", ".venv/ready", f"FOLDER={folder}", f"PY=sh {python}"]
    command = ["env", *options, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done, [line.split()[0] for line in (folder / "calls").read_text().splitlines()]


def test_a_demo_goes_on_where_it_stopped(tmp_path):
    """What has failed is shown and is made again; what was made is not."""
    done, calls = make(tmp_path, "SEED=3", "BROKEN=train_qp.py")
    assert done.returncode and "no luck" in done.stdout
    assert "train_qp.py" in calls and "-m" in calls and calls.count("evaluate.py") == 0
    assert {"masks.txt", "g.txt.part"} <= set(os.listdir(tmp_path / "demo-seed3" / "log"))
    assert not (tmp_path / "demo-seed3" / "log" / "g.txt").exists()
    done, again = make(tmp_path, "SEED=3", "BROKEN=nothing")
    assert done.returncode == 0, done.stderr
    assert "corrupt.py" not in again and again.count("train_qp.py") == 1
    assert calls.count("train_ssl.py") + again.count("train_ssl.py") == 4
    assert again.count("evaluate.py") == 2
    assert len(done.stdout.splitlines()) < 60
    _, finished = make(tmp_path, "SEED=3", "BROKEN=nothing")
    assert finished == ["-m"]  # the conclusion alone


def test_options_of_make_reach_the_demo(tmp_path):
    """And those of the demo itself, unless they are given, whatever the environment holds."""
    command = ["make", "-n", "demo3d", "-o", ".venv/ready", f"FOLDER={tmp_path}", "LABELED=3"]
    command = ["env", "LABELED=9", "METHOD=bcp", *command]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert told.count("--labeled 3 ") == 4 and told.count("--method fixmatch ") == 2
    assert told.count(f"{tmp_path}/demo3d/vqm ") == 1 and "--window whole" in told


def test_the_distillation_asks_make_for_the_demos_commands(monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = distillation.commands(2)
    assert {"phantom.h5", "supervised", "guided"} <= set(argv)
    args = train_ssl.parse_args(argv["guided"])
    assert (args.method, args.correct, args.weight, args.seed) == ("fixmatch", True, "quality", 2)
    words = distillation.changed(argv["guided"], out="o", qp="second.pt")
    new = train_ssl.parse_args(words)
    assert vars(new) == vars(args) | dict(out="o", qp="second.pt")
    of_g = train_qp.parse_args(argv["qp"])
    of_second = train_ssl.parse_args([*argv["supervised"], *distillation.AS_G.split()])
    assert (of_second.batch, of_second.strength) == (of_g.batch, of_g.strength)
    assert of_second.width == of_g.width and of_g.members == 1
    slices = 4 * 8  # of the labeled patients
    assert of_second.steps == of_g.epochs * of_g.per_image * slices // of_g.batch
