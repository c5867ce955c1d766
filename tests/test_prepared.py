"""How the images of data and of checkpoints were prepared: what contradicts is refused or noted."""

import json
import shutil

import h5py
import pytest
import torch
from test_evaluate import make_run

import evaluate
import train_ssl
from data import h5, prepared
from data.files import InputError
from models import checkpoints

CT, NARROW, MR = (
    dict({"from": "nifti", "spacing": [2, 1, 1], "channel": None, "nnunet": False}, window=window)
    for window in ([-175.0, 250.0], [0, 200], None)
)


def said(prepared=None, standardize=None):
    """What Info.describe() says of these. standardize: default: what data.nifti gives"""
    windowed = isinstance(prepared, dict) and prepared.get("window") is not None
    return dict(standardize=not windowed if standardize is None else standardize, prepared=prepared)


@pytest.mark.parametrize(
    "theirs, ours, words",
    [
        (
            said(NARROW),
            said(CT),
            [
                "b.pt",
                "window 0,200",
                "d.h5",
                "window -175,250",
                "convert d.h5 again with --intensity ct --clip 0,200",
            ],
        ),
        (said(CT), said(MR), ["window -175,250", "standardized case by case", "--clip -175,250"]),
        (said(MR), said(CT), ["standardized case by case", "again with --intensity mr"]),
        (said(), said(CT), ["standardized case by case", "window -175,250", "convert both alike"]),
        (said(CT), said(), ["window -175,250", "--intensity ct --clip -175,250"]),
        (
            said(None, False),
            said(MR),
            ["unknown window", "standardized case by case", "both alike"],
        ),
        (dict(prepared=None), said(CT), ["standardized case by case"]),  # an old checkpoint
        (
            said(MR | {"axes": "SPL"}),
            said(MR | {"axes": "SAR"}),
            ["axes SPL", "along SAR", "--axes SPL"],
        ),
        (said(CT | {"window": "wide"}), said(CT), ["window wide", "window -175,250"]),
        (said(CT | {"window": [10**400, torch.ones(3)]}), said(CT), ["beyond all numbers,?"]),
    ],
)
def test_other_intensities_are_refused(theirs, ours, words):
    with pytest.raises(InputError) as found:
        prepared.check({"d.h5": ours}, {"b.pt": theirs})
    assert all(word in str(found.value) for word in words), found.value


@pytest.mark.parametrize(
    "theirs, ours, of_a, of_d",
    [
        (said(CT), said(CT | {"spacing": [1, 1.0, 1]}), "spacing 2 x 1 x 1", "spacing 1 x 1 x 1"),
        (said(CT), said(CT | {"spacing": None}), "spacing 2 x 1 x 1", "spacing none"),
        (said(MR | {"channel": 1}), said(MR), "channel 1", "channel none"),
        (said({"from": "pictures"}), said(MR), "from pictures", "from nifti"),
        (
            said(MR | {"a": {"b": 1}, "c\n": 2}),
            said(MR | {"a": 1, "c\n": 3}),
            "a ?, c? 2",
            "a 1, c? 3",
        ),
        (
            said(CT),
            said(None, False),
            "clipped to the window -175,250",
            "brought to an unknown window (standardize False)",
        ),
        (
            said(None, False),
            said(CT),
            "brought to an unknown window (standardize False)",
            "clipped to the window -175,250",
        ),
    ],
)
def test_another_spacing_channel_or_an_unknown_window_is_noted_once(
    theirs, ours, of_a, of_d, capsys
):
    prepared.check({"d.h5": ours}, {"a.pt": theirs, "b.pt": theirs, "c.pt": ours})
    words = f"{of_a} for a.pt (and 1 more), but {of_d} for d.h5; convert both with the same options"
    assert capsys.readouterr().out == f"note: images were prepared differently: {words}\n"


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (said(CT), said(json.loads(json.dumps(CT)))),
        (said(), said(MR)),
        (said(MR | {"channel": 0}), said(MR)),
        ({}, said(MR)),
        ({}, said()),
        (said(MR | {"axes": "SPL"}), said(MR)),
        (said(MR), said(MR | {"nnunet": True})),
        (dict(standardize=torch.ones(2), prepared=[1]), said(MR)),
        (said("ct"), said(MR)),
        (said(CT | {"window": (-175, 250)}), said(CT)),
    ],
)
def test_what_fits_or_is_not_known_passes_without_a_word(theirs, ours, capsys):
    prepared.check({"d.h5": ours}, {"a.pt": theirs})
    assert capsys.readouterr().out == ""


def test_voxels_of_clearly_another_size_are_noted(capsys):
    at = lambda *mm, **data: said(**data) | {"spacing": list(mm)}
    fine, coarse = at(2.5, 0.25, 0.25), at(2.5, 1.0, 1.0, prepared=MR | {"spacing": None})
    words = "voxels of 2.5 x 1 x 1 mm for a.pt, but voxels of 2.5 x 0.25 x 0.25 mm for d.h5"
    prepared.check({"d.h5": fine, "a.pt": coarse}, {"a.pt": coarse})
    assert f"{words}; convert both with one --spacing" in capsys.readouterr().out
    for theirs in (at(2.5, 0.3, 0.3), at(0, None, "1"), at("2"), said() | {"spacing": 7}, said()):
        prepared.check({"d.h5": fine}, {"a.pt": theirs})
        prepared.check({"d.h5": theirs}, {"a.pt": fine})
    assert capsys.readouterr().out == ""


def test_a_file_knows_the_median_of_its_spacings(gray, rgb, tmp_path):
    shutil.copy(gray, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        f["train/phantom000"].attrs["spacing"] = [9, 8, 7]
        f["train/phantom001"].attrs.update(spacing=[9, 99, 99], spacing_known=False)
    mm = h5.read_info(gray).entries("val")[0].spacing[1:]
    assert h5.read_info(tmp_path / "f.h5").spacing == h5.read_info(gray).spacing == [*mm]
    assert h5.read_info(rgb).spacing is None


def test_checkpoints_are_compared_where_the_data_say_nothing():
    runs = {"a.pt": said(CT), "b.pt": said(NARROW)}
    with pytest.raises(InputError, match="b.pt: .* 0,200, but those of a.pt .*; leave one of them"):
        prepared.check({"d.h5": said(None, False)} | runs, runs)


def test_each_is_compared_with_the_data_even_where_those_say_little():
    runs = {"a.pt": said(CT)}
    with pytest.raises(InputError, match="a.pt: .* but those of d.h5 .*; convert d.h5 again with"):
        prepared.check({"d.h5": said()} | runs, runs)


def as_ct(source, path, window):
    """A copy of a dataset that says that it was clipped to a window."""
    shutil.copy(source, path)
    with h5py.File(path, "a") as f:
        f.attrs["standardize"] = False
        f.attrs["prepared"] = json.dumps(CT | {"window": window})
    return str(path)


def test_every_script_compares(gray, gray_quality, tmp_path, refused):
    wide, narrow = (as_ct(gray, tmp_path / f"{w[1]}.h5", w) for w in ([-175, 250], [0, 200]))
    runs = [
        make_run(tmp_path / name, h5.read_info(data)) for name, data in (("w", wide), ("n", narrow))
    ]
    out, clip = ["--out", tmp_path / "out"], "--clip 0,200"
    refused(evaluate.main, [wide, *runs, *out], runs[1], "250.h5", clip)
    refused(evaluate.main, [wide, runs[1], "--predict", *out], runs[1], clip)
    state = torch.load(gray_quality[1], weights_only=True)
    state["data"] |= said(NARROW)
    torch.save(state, tmp_path / "qp.pt")
    g = ["--qp", tmp_path / "qp.pt"]
    refused(evaluate.main, [wide, runs[0], *g, *out], "qp.pt", clip)
    refused(
        evaluate.main,
        [wide, runs[0], *g, "--predict", *out],
        "qp.pt",
        "; give a g that has learned",
    )
    ssl = [wide, "--size", "32", "--method", "mean_teacher", *out]
    refused(train_ssl.main, [*ssl, "--weight", "quality", *g], "qp.pt", clip)
    refused(train_ssl.main, [*ssl, "--unlabeled", narrow], "200.h5", "convert", "--clip -175,250")


def test_other_voxels_are_noted_by_every_script(gray, gray_quality, tmp_path, capsys):
    shutil.copy(gray, fine := str(tmp_path / "fine.h5"))
    with h5py.File(fine, "a") as f:
        for case in (case for split in f.values() for case in split.values()):
            case.attrs["spacing"] = case.attrs["spacing"] / 2
    run, old = (make_run(tmp_path / n, h5.read_info(gray)) for n in ("run", "old"))
    state = torch.load(old, weights_only=True)
    del state["data"]["spacing"]
    torch.save(state, old)
    out = ["--out", str(tmp_path / "out")]
    ssl = "--size 32 --labeled 2 --method mean_teacher --steps 1 --width 4 --batch 2 --unlabeled"
    for main, argv, other in (
        (evaluate.main, [fine, run, "--pictures", "0"], run),
        (evaluate.main, [fine, run, "--predict", "--qp", gray_quality[1]], run),
        (train_ssl.main, [gray, *ssl.split(), fine], gray),
    ):
        main([*argv, *out])
        told = capsys.readouterr().out
        assert told.count("voxels of ") == 2 and "note: images were prepared differently" in told
        assert f" for {other}" in told and f" for {fine}" in told
    state = torch.load(gray_quality[1], weights_only=True)
    state["data"]["spacing"] = [9.0, 9.0]
    torch.save(state, g := str(tmp_path / "qp.pt"))
    evaluate.main([gray, run, "--predict", "--split", "val", "--qp", g, "--overwrite", *out])
    assert f"voxels of 9 x 9 mm for {g}, but voxels of 1.5 x 1.5 mm" in capsys.readouterr().out
    evaluate.main([fine, old, "--pictures", "0", *out])
    evaluate.main([gray, run, "--pictures", "0", *out])
    assert "voxels of" not in capsys.readouterr().out


def test_a_g_of_other_flips_is_noted(gray, gray_quality, tmp_path, capsys, refused):
    info, on = h5.read_info(gray), evaluate.compute("cpu", "off")
    load = lambda path, **fs: checkpoints.load_quality(path, info, on, 32, fs)
    load(gray_quality[1], f={"flip": None}, old={}, same={"flip": "H,W"})
    assert "flips" not in capsys.readouterr().out
    load(gray_quality[1], f={"flip": "H"})
    assert "g has seen flips along all axes, but f along H; train" in capsys.readouterr().out
    state = torch.load(gray_quality[1], weights_only=True)
    for flip, other, words in (
        ("none", None, "no axis, but f along all axes"),
        ("W", "H", "W, but f along H"),
    ):
        state["args"]["flip"] = flip
        torch.save(state, tmp_path / "qp.pt")
        load(str(tmp_path / "qp.pt"), f={"flip": other})
        assert words in capsys.readouterr().out
    refused(lambda _: load(gray_quality[1], f={"flip": "D"}), [], "f: --flip D", "train it again")


def test_runs_of_other_flips_are_rows_of_their_own(gray, tmp_path):
    info = h5.read_info(gray)
    paths = [
        make_run(tmp_path / str(seed), info, seed=seed, flip=flip)
        for seed, flip in enumerate((None, None, "H"))
    ]
    states = [torch.load(path, weights_only=True) for path in paths]
    del states[1]["args"]["flip"]  # older than the option
    names = [(name, members) for name, _, members in evaluate.group_runs(states, paths)]
    assert names == [("supervised (flip=None)", [0, 1]), ("supervised (flip=H)", [2])]
