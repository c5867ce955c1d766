"""Training steps on a GPU: what a machine without one can tell of them, and the rest where one is.

The tests marked `gpu` need CUDA and are skipped without it.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
import train_ssl
from data import loading
from models.device import Compute, Graph

K = 3
CPU = torch.device("cpu")


def settings(method, *more):
    """Options of a tiny run in which lambda, and that of QAR, grow from step 2 on."""
    argv = "d.h5 --out o --qp g.pt --size 16 --width 2 --steps 8 --optimizer sgd --flip H"
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
    """What Feed gives for some steps."""
    torch.manual_seed(1)

    def fetched(n, labels):
        image = torch.randint(256, (n, 1, 16, 16), dtype=torch.uint8)
        label = (image[:, 0] // 90).to(torch.uint8) if labels else None
        return loading.Fetched(image, label, torch.full((n,), 128.0), torch.full((n,), 50.0))

    return [(fetched(2, True), fetched(3, False), torch.rand(2)) for _ in range(count)]


def train(run, args, fetched):
    """Some steps. -> PARTS of each, weights of students and teacher"""
    parts = [train_ssl.whole_step(run, item, args, step) for step, item in enumerate(fetched, 1)]
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


def options_of(method, guidance):
    more = ["--conf-threshold", "0.35"]
    more += ["--no-largest-component"] if method == "bcp" else []
    return settings(method, *more, *guidance.split())


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
    fetched = items(8)
    parts, weights = train(start(args, on), args, fetched)
    run = start(args, on)
    run.graph = train_ssl.graph_of(run, args)
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
        assert train_ssl.graph_of(run, settings("supervised", *more)) is None
        said = capsys.readouterr().out
        assert said.startswith("note: --graph: ") and words in said and said.count("\n") == 1
    for method, guidance in GUIDED:
        on = Compute(torch.device("cuda"), torch.bfloat16)
        assert not train_ssl.why_no_graph(on, options_of(method, guidance))
