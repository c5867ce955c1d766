"""Training steps on a GPU: what a machine without one can tell of them, and the rest where one is.

The tests marked `gpu` need CUDA and are skipped without it.
"""

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import models
import train_ssl
from data import h5, loading
from models import inference
from models.checkpoints import load_checkpoint
from models.device import Compute, Graph, compute

K = 3
INFO = SimpleNamespace(classes="abc", color=False)  # what a step asks of the data
CPU = torch.device("cpu")


def settings(method, *more, steps=8):
    """Options of a tiny run in which lambda, and that of QAR, grow from step 2 on."""
    argv = f"d.h5 --out o --qp g.pt --size 16 --width 2 --steps {steps} --optimizer sgd --flip H"
    ramps = "--lam 1 --lam-warmup 0 --lam-ramp 1 --qar-warmup 0.05 --qar-ramp 1"
    return train_ssl.parse_args(
        [*argv.split(), "--method", method, *ramps.split(), "--mc-passes", "2", *more]
    )


def start(args, on):
    """A run on a device, with a g."""
    torch.manual_seed(0)
    shape = dict(channels=1, classes=K)
    g = on.place(models.build("quality_dense", **shape, size=16, width=2, members=2))
    network = dict(name="unet", width=2, **shape)
    run = train_ssl.build_run(network, g.eval().requires_grad_(False), args, on, fresh=True)
    with torch.no_grad():  # decided networks, of whose answers something comes
        for net in (*run.nets, run.teacher):
            net.head.weight.mul_(50)
    return run


def items(count, device=CPU):
    """What Feed gives for some steps, on a device."""
    torch.manual_seed(1)

    def fetched(n, labels):
        image = torch.randint(256, (n, 1, 16, 16), dtype=torch.uint8)
        label = (image[:, 0] // 90).to(torch.uint8) if labels else None
        return loading.Fetched(image, label, torch.full((n,), 128.0), torch.full((n,), 50.0))

    found = [(fetched(2, True), fetched(3, False), torch.rand(2)) for _ in range(count)]
    return tree_map(lambda v: v.to(device) if torch.is_tensor(v) else v, found)


def train(run, args, fetched):
    """Some steps. -> PARTS of each, weights of students and teacher"""
    parts = [
        train_ssl.whole_step(run, item, INFO, args, step) for step, item in enumerate(fetched, 1)
    ]
    weights = [p for net in [*run.nets, run.teacher] for p in net.state_dict().values()]
    return torch.stack(parts), weights


GUIDANCE = [
    "",
    "--weight confidence --weight-level class --weight-threshold 0.4",
    "--weight quality --weight-level image --weight-threshold 0.05 --qar 0.1",
    "--weight quality --weight-level class --weight-threshold 0.05",
    "--weight quality --weight-level pixel --weight-threshold 0.05 --qar 0.1",
    "--correct --weight quality --weight-level pixel --weight-threshold 0.05",
    "--correct --weight quality --weight-level class --weight-threshold 0.05 --qar 0.1",
]
METHODS = [method for method in train_ssl.METHODS if method != "contrastive"]
GUIDED = list(zip(METHODS, itertools.cycle(GUIDANCE)))  # the first, supervised, by nothing


def options_of(method, guidance, **steps):
    more = ["--conf-threshold", "0.35"]
    more += ["--no-largest-component"] if method == "bcp" else []
    return settings(method, *more, *guidance.split(), **steps)


def trained(data, out, *more, device="cuda"):
    """The last checkpoint of a short run."""
    argv = "--labeled 3 --size 32 --width 4 --steps 8 --eval-every 4 --batch 4 --batch-unlabeled 4"
    method = f"--method mean_teacher --lam-warmup 0.2 --device {device}"
    train_ssl.main([data, "--out", str(out), *argv.split(), *method.split(), *more])
    return load_checkpoint(out / "last.pt", "ssl")


def in_two_parts(data, out, *more, **device):
    """trained() that dies at the sixth step and goes on."""
    step, calls = train_ssl.whole_step, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ssl, "whole_step", dies)
        with pytest.raises(KeyboardInterrupt):
            trained(data, out, *more, **device)
    return trained(data, out, *more, "--resume", **device)


def assert_close(a, b, atol):
    """That two checkpoints hold nearly the same weights."""
    for net, other in zip([*a["nets"], a["teacher"]], [*b["nets"], b["teacher"]], strict=True):
        for name, weights in net.items():
            assert torch.allclose(weights.float(), other[name].float(), atol=atol), name


# ----------------------------------------------------------- without a GPU: a tape for a graph


class Tape(TorchDispatchMode):
    """Records operators, and runs them again as a CUDA graph does: on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.fresh = True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        """Runs them again; but not the first time, since recording has run them once."""
        calls = [] if self.fresh else self.calls
        self.fresh = False
        for operator, args, kwargs, out in calls:
            for old, new in zip(tree_leaves(out), tree_leaves(operator(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Taped(Graph):
    """A Graph whose capture is a Tape."""

    def warm_up(self, inputs):
        return self.function(*inputs)

    def capture(self, inputs):
        with Tape() as tape:
            self.output = self.function(*inputs)
        self.made = [c for c, *_ in tape.calls if "lift_fresh" in str(c)]  # of Python's numbers
        return tape.replay


@pytest.mark.parametrize("method, guidance", GUIDED)
def test_a_replayed_step_is_a_step(method, guidance, monkeypatch):
    """What changes from step to step is not baked into the first one."""
    monkeypatch.setattr(train_ssl, "Graph", Taped)
    monkeypatch.setattr(train_ssl, "why_no_graph", lambda *_: "")
    args = options_of(method, guidance)
    on = Compute(CPU, None)
    fetched = items(6)  # three as they are, the capture, and two more
    parts, weights = train(start(args, on), args, fetched)
    run = start(args, on)
    run.graph = train_ssl.graph_of(run, INFO, args)
    replayed, same = train(run, args, fetched)
    assert run.graph.replay and not run.graph.made
    assert (parts[-1, 1:4] > 0).tolist() == [True, method != "supervised", args.qar > 0]
    assert torch.allclose(replayed, parts, atol=1e-5)
    for a, b in zip(weights, same, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_graph_takes_new_numbers_and_begins_anew_at_a_new_kind():
    calls = []

    def function(pair, number, more):
        calls.append(more)
        return pair[0] * number + (0 if pair[1] is None else pair[1])

    graph = Taped(function, CPU)
    for i in range(1, 8):
        x = torch.full((2,), float(i))
        assert graph((x, None), i / 8, 0.0).tolist() == [i * i / 8] * 2
    assert calls == [0.0] * 4  # three as they are, and the capture
    kept = graph((x, None), 2.0, 0.0)
    graph((x, None), 3.0, 0.0)
    assert kept.tolist() == [14.0] * 2  # each call gives a tensor of its own
    for more in ((x[:1], None), 2.0, 0.0), ((x, None), 0.0, 0.0), ((x, x), 2.0, 0.0):
        assert torch.equal(graph(*more), function(*more))
    assert len(calls) == 10


def test_what_cannot_be_a_graph_says_so(capsys):
    cases = [
        (CPU, None, [], "needs a GPU"),
        (torch.device("cuda"), torch.float16, [], "fp16"),
        (torch.device("cuda"), None, ["--method", "contrastive"], "contrastive draws"),
        (torch.device("cuda"), None, ["--method", "bcp"], "--largest-component"),
    ]
    for device, amp, more, words in cases:
        run = replace(start(settings("supervised"), Compute(CPU, None)), on=Compute(device, amp))
        assert train_ssl.graph_of(run, INFO, settings("supervised", *more)) is None
        said = capsys.readouterr().out
        assert said.startswith("note: --graph: ") and words in said and said.count("\n") == 1
    for method, guidance in GUIDED:
        on = Compute(torch.device("cuda"), torch.bfloat16)
        assert not train_ssl.why_no_graph(on, options_of(method, guidance))


def test_a_run_with_a_graph_resumes_to_the_same_weights(gray, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ssl, "Graph", Taped)
    monkeypatch.setattr(train_ssl, "why_no_graph", lambda *_: "")
    options = dict(device="cpu")
    whole = trained(gray, tmp_path / "whole", "--graph", **options)
    assert torch.is_tensor(whole["optimizer"]["param_groups"][0]["lr"])
    assert_close(whole, in_two_parts(gray, tmp_path / "parts", "--graph", **options), 0)


def test_a_run_on_a_cpu_says_that_it_has_no_graph(gray, tmp_path, capsys):
    trained(gray, tmp_path, "--graph", "--steps", "1", device="cpu")
    assert capsys.readouterr().out.count("note: --graph: needs a GPU with CUDA") == 1


def test_the_command_for_a_gpu_runs_without_one(tmp_path):
    """As long as its time lasts, which is the first row here."""
    env = os.environ | {"PY": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", str(ROOT / "results" / "gpu.sh"), "1"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| mean_teacher |" in (tmp_path / "steps.md").read_text()
    assert "steps: the time is up" in done.stdout and "members: the time is up" in done.stdout


# --------------------------------------------------------------------------------- with a GPU only


def gpu(test):
    """A test that needs CUDA."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


@gpu
@pytest.mark.parametrize("method, guidance", GUIDED)
def test_a_graph_gives_the_losses_of_plain_steps(method, guidance):
    args = options_of(method, guidance, steps=20)
    on = compute("cuda", "off")
    fetched = items(20, on.device)
    parts, _ = train(start(args, on), args, fetched)
    run = start(args, on)
    run.graph = train_ssl.graph_of(run, INFO, args)
    replayed, _ = train(run, args, fetched)
    assert run.graph.replay
    assert torch.allclose(replayed, parts, atol=1e-3)


@gpu
@pytest.mark.parametrize("method, guidance", GUIDED)
def test_a_step_never_waits_for_the_gpu(method, guidance):
    args = options_of(method, guidance)
    run = start(args, compute("cuda"))
    fetched = items(3, run.on.device)
    train(run, args, fetched)
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts, _ = train(run, args, fetched)  # a wait is an error
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert parts.isfinite().all()


@gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_precisions_on_a_gpu(gray, tmp_path, amp):
    state = trained(gray, tmp_path, "--amp", amp)
    assert state["finished"] and state["parts"].numel() == 0
    assert (state["scaler"].get("scale", 0) > 0) == (amp == "fp16")


@gpu
@pytest.mark.parametrize("more", [[], ["--graph"]])
def test_a_run_on_a_gpu_resumes(gray, tmp_path, more):
    options = [*more, "--deterministic", "--amp", "off"]
    whole = trained(gray, tmp_path / "whole", *options)
    assert_close(whole, in_two_parts(gray, tmp_path / "parts", *options), 1e-4)


@gpu
def test_images_on_a_gpu_are_those_in_memory(gray, tmp_path):
    states = [
        trained(gray, tmp_path / cache, "--cache", cache, "--deterministic", "--amp", "off")
        for cache in ("device", "ram", "off")
    ]
    for other in states[1:]:
        assert_close(states[0], other, 1e-4)


@gpu
@pytest.mark.parametrize("guidance", GUIDANCE[2:])
def test_guidance_on_a_gpu(gray, gray_quality, tmp_path, guidance):
    more = ["--qp", gray_quality[1], "--qar-warmup", "0.2", *guidance.split()]
    assert trained(gray, tmp_path, *more)["finished"]


@gpu
def test_a_sliding_window_on_a_gpu(volumes):
    torch.manual_seed(0)
    net = models.build("vnet", channels=1, classes=4, dims=3, width=4).eval()
    info = h5.read_info(volumes)
    size = (16, 32, 32)
    labels = []
    for device in ("cpu", "cuda"):
        on = compute(device, "off")
        cases = inference.Cases(info, "val", size)
        window = inference.Window(size, (8, 16, 16))
        found = inference.predict_cases(on.place(copy.deepcopy(net)), cases, on, window)
        labels.append([label for _, label, _ in found])
    for a, b in zip(*labels, strict=True):
        assert (a == b).mean() > 0.99


@gpu
def test_compiled_networks_on_a_gpu(gray, tmp_path):
    assert trained(gray, tmp_path, "--compile")["finished"]
