"""Stage 2: trains the quality predictor g(image, mask) -> Dice of each foreground class.

    python train_qp.py DATA.h5 --vqm runs/vqm/vqm.h5 --out runs/qp
    torchrun --nproc_per_node=4 train_qp.py ...   # the same, each step's --batch shared by four

Reads  DATA.h5 (images, and labels of the cases that vqm.h5 names), vqm.h5 of corrupt.py.
Writes OUT/qp.pt                   g
       OUT/last.pt                 to --resume
       OUT/log.csv                 a row an epoch; TensorBoard events beside it
       OUT/qp.md, qp.json, qp.png  the report on val

g answers with the smoothed Dice (models/quality.py) of the mask that it sees, hard or soft, after
augmentation. --head scalar, the paper's, regresses it. --head dense predicts the truth from image
and mask, and reads off the mask's expected Dice. The report tells apart synthetic masks and real
outputs: predictions of the weak networks on val cases, which none of them has seen.

Legend: N masks, B batch, K classes, C channels of the image; *S the grid that g sees, S, S of
slices or D, H, W of patches of volumes.
"""

import copy
import itertools
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import models
from data import augment, figures, h5, loading, metrics, quality_masks, supervision
from data.files import InputError
from data.labels import without
from data.log import Log
from data.options import (
    SEED,
    SHARE,
    Parser,
    cli,
    flip_axes,
    folder,
    grid,
    note_idle,
    number,
    seed_of,
)
from data.tables import markdown, write_text
from data.workers import postponed_signals
from models import checkpoints, distributed, inference
from models.checkpoints import check_finite, save_checkpoint, start_run
from models.device import (
    Compute,
    channels_last,
    compiled,
    compute,
    device_name,
    restore_scaler,
)
from models.ema import update_average
from models.losses import one_hot, seg_loss, weighted_mean
from models.quality import Seen, quality_target, resample, true_dice, with_background

# ----------------------------------------------------------------------------------------- batches


def epoch_rows(masks, per_image):
    """Random masks for an epoch: per_image of every sample, shuffled. -> [samples * per_image]"""
    chance = torch.rand(len(masks.index), dtype=torch.float64)
    # The key is the sample's number plus a random fraction. So the masks of a sample stand
    # together, in random order. Each sample has as many, which reshape() needs.
    rows = torch.argsort(masks.index + 0.999 * chance)
    rows = rows.reshape(len(masks.samples), -1)[:, :per_image].flatten()
    return rows[torch.randperm(len(rows))]


def augmented_batch(masks, rows, info, device, args):
    """One augmented batch. info: of the data

    -> Seen (its masks are hard or soft), truth [B, K-1, *S]
    Geometry moves image, mask and truth together; intensity changes the image alone.
    """
    image, label = masks.samples.batch(masks.index[rows], device)  # [B, C, *S], [B, *S]
    K = len(info.classes)
    s = args.strength
    way = augment.random_geometry(
        image, rotate=45 * s, scale=0.3 * s, shift=0.15 * s, flip=args.flip
    )
    mask = augment.move(masks.mask[rows].long().to(device), way)  # [B, *S]
    mask = one_hot(mask, K)[:, 1:]
    truth = one_hot(augment.move(label, way), K)[:, 1:]
    mask = some_soft(mask, masks, rows, way, args.soft)
    image = augment.strong(augment.move(image, way), s, info.color)
    return Seen(image, mask), truth


def some_soft(mask, masks, rows, way, share):
    """Makes a share of hard masks soft, as those are that QAR shows g.

    A soft mask is a weak network's probabilities, moved the same way, where it came from one; else
    the mask blurred. mask [B, K-1, *S] -> the same shape
    """
    chosen = torch.rand(len(rows)) < share
    harvested = chosen & (masks.prob_index[rows] >= 0)
    blurred = chosen & ~harvested
    soft = mask.clone()
    if harvested.any():
        at = harvested.nonzero()[:, 0].to(mask.device)
        numbers = masks.prob_index[rows][harvested].tolist()
        p = torch.stack([masks.prob[i] for i in numbers])  # [b, K-1, *S] uint8
        soft[at] = augment.move(p.to(mask.device).float() / 255, way[at])
    if blurred.any():
        at = blurred.nonzero()[:, 0].to(mask.device)
        most = 0.02 * mask.shape[-1] + 0.5  # pixels
        sigma = augment.uniform(0.5, most, mask[at])
        soft[at] = augment.blur(mask[at], sigma, most)
    return soft


# --------------------------------------------------------------------------- the two heads' losses
# loss(g, views, args) -> a number.
# views: (Seen, truth [B, K-1, *S]) of one batch, augmented anew in each.


def scalar_loss(g, views, args):
    """Smooth L1 between g(image, mask) and the smoothed Dice of that mask."""
    seen, truth = views[0]
    return F.smooth_l1_loss(g(seen), quality_target(seen.mask, truth))


def dense_loss(g, views, args):
    """Each member segments the truth, from a view of its own that shows the mask or withholds it.

    (cross-entropy + soft Dice) / 2 of the answer, plus Smooth L1 between the expected Dice that is
    read off the answer and the smoothed Dice of the mask, of the classes that the truth holds: with
    the others, members segment worse (results/quality).
    """
    total = 0.0
    for member, (seen, truth) in zip(g.members, views):
        shown = (torch.rand(len(seen), device=truth.device) >= args.mask_dropout).float()  # [B]
        logits = member(channels_last(g.show(seen, shown)))  # [B, K, *S]
        answer = logits.float().softmax(1)[:, 1:]  # [B, K-1, *S]
        expected = quality_target(seen.mask, answer)  # [B, K-1]
        dice = quality_target(seen.mask, truth)
        wrong = F.smooth_l1_loss(expected, dice, beta=0.1, reduction="none")
        held = truth.flatten(2).amax(2)  # [B, K-1]
        loss = seg_loss(logits, with_background(truth))
        total = total + loss + args.quality_loss * weighted_mean(wrong, held)
    return total


HEADS = {"dense": dense_loss, "scalar": scalar_loss}


# ------------------------------------------------------------------------------- one training step


@dataclass
class Run:
    """What a run holds, all of which a checkpoint keeps."""

    net: torch.nn.Module  # what is trained
    g: torch.nn.Module  # its moving average, in eval mode: what is kept
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    on: Compute
    steps: int  # of an epoch
    inputs: dict  # checksums of other files
    epoch: int = 0  # the epochs that are done
    best: dict = field(default_factory=lambda: {"error": float("inf"), "epoch": 0})
    losses: list = field(default_factory=list)  # of the steps of the epoch that is under way
    start: float = 0.0  # of that epoch, by time.perf_counter()


def train_step(run, data, rows, args, step):
    """One optimizer step on the masks of some rows of train. -> loss (a tensor)"""
    count = args.members if args.head == "dense" else 1
    views = [
        augmented_batch(data.train, rows, data.info, run.on.device, args) for _ in range(count)
    ]
    with run.on.autocast():
        loss = HEADS[args.head](run.net, views, args)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    distributed.average_gradients(run.net.parameters())
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.schedule.step()
    # The average takes in g's temperature, too, which is fitted anew before g is asked or kept.
    update_average(run.g, run.net, step, args.ema)
    return loss.detach()


# --------------------------------------------------------------------------------------- one epoch


@dataclass
class Data:
    """The masks that g learns from, and those that it is judged by."""

    info: h5.Info
    train: quality_masks.Masks
    synthetic: quality_masks.Masks  # of val
    real: quality_masks.Masks  # of val
    held: np.ndarray  # [K-1] bool: the classes that val's labels hold; no other counts

    @property
    def classes(self):
        """The names of the background and of the classes that count."""
        return [self.info.classes[0], *itertools.compress(self.info.classes[1:], self.held)]


def train_epoch(run, data, args, stop):
    """Trains for an epoch, or the rest of one that was stopped.

    -> mean loss, and the learning rate that the epoch ends with
    stop: of postponed_signals(). If a signal comes, the process saves its steps and ends.
    """
    epoch = run.epoch + 1
    torch.manual_seed(seed_of(args.seed, epoch, 0))
    rank = distributed.rank()
    batches = own_batches(epoch_rows(data.train, args.per_image), args.batch)
    done = len(run.losses)
    bar = tqdm(
        batches[done:],
        desc=f"epoch {epoch}",
        unit=" steps",
        leave=False,
        disable=not sys.stderr.isatty() or rank > 0,
    )
    for step, rows in enumerate(bar, run.epoch * run.steps + done + 1):
        torch.manual_seed(seed_of(args.seed, step, 1 + rank))
        run.losses.append(train_step(run, data, rows, args, step))
        leave_if_stopped(stop, run, data, args)
    loss = mean_losses(run).mean().item()
    rate = run.schedule.get_last_lr()[0]
    run.epoch = epoch
    run.losses = []
    return loss, rate


def own_batches(rows, batch):
    """This process's share of each batch of an epoch. -> [batch / processes] each

    Batch norm needs two masks in a batch, and every process needs one.
    """
    rank, world = distributed.rank(), distributed.world()
    whole = [part for part in rows.split(batch) if len(part) >= max(2, world)]
    return [part[: len(part) // world * world][rank::world] for part in whole]


def mean_losses(run):
    """The loss of each step of the epoch under way, over all processes. -> [steps]

    InputError where a loss or a weight is not finite.
    """
    losses = distributed.mean(torch.stack(run.losses))
    step = run.epoch * run.steps + len(losses)
    advice = "try --amp off or a lower --lr"
    check_finite(losses[:, None], ["loss"], [run.net], step, lambda _: advice)
    return losses


# ------------------------------------------------------------------------------------- temperature

TEMPERATURES = torch.logspace(0, 2, 9, base=2)  # 1 to 4. Below 1, g would only get surer of itself


@torch.no_grad()
def fit_temperature(g, masks, on, held, most=300):
    """Sets a dense g's temperature to that of the least mean error in Dice on masks of val.

    The masks are evenly thinned out to `most`. held [K-1]: the classes that count.
    Guo et al. (On calibration of modern neural networks, ICML 2017) fit it by likelihood.
    """
    errors = []  # of each mask: [temperatures]
    for seen, truth in inference.judged_masks(masks, g.config["classes"], on, most, batch=16):
        with on.autocast():
            logits = g.logits(seen)  # [M, V, B, K, *S]
        true = true_dice(seen.mask, truth)  # [B, K-1]
        mask = resample(seen.mask, g.size)
        for_each = []
        for t in TEMPERATURES:
            answer = (logits / t).softmax(3).mean((0, 1))[:, 1:]  # [B, K-1, *S]
            error = (quality_target(mask, answer) - true).abs()  # [B, K-1]
            for_each.append(error[:, held].sum(1))
        errors += torch.stack(for_each, 1).cpu()
    total = torch.stack(distributed.gather(errors)).sum(0)  # [temperatures]
    g.temperature.fill_(TEMPERATURES[total.argmin()])


def mean_error(g, masks, data, on):
    """Mean error in Dice, over at most 300 masks and the classes that count."""
    predicted, true, _ = inference.estimate_masks(g, masks, on, most=300)  # [N, K-1] each
    return float(np.abs(predicted - true)[:, data.held].mean())


# ------------------------------------------------------------------------------------------ report


class Report(NamedTuple):
    """What a g is worth on val."""

    rows: list  # of a table: agreement with the true Dice
    panels: dict  # {kind of masks: (predicted, true, present) [N, K-1]}
    image_dependence: dict  # {change of the image: correlation with g's answers before}


def make_report(g, data, on):
    """Agreement on synthetic masks and on real outputs, and dependence on the image. -> Report"""
    rows = []
    panels = {}
    for title, masks in (("synthetic masks", data.synthetic), ("real outputs", data.real)):
        estimate = inference.estimate_masks(g, masks, on, most=2000)
        predicted, true, present = (v[:, data.held] for v in estimate)  # [N, K-1] each
        rows += metrics.quality_rows(title, predicted, true, present, data.classes)
        panels[title] = predicted, true, present
    return Report(rows, panels, image_dependence(g, data.synthetic, on))


def image_dependence(g, masks, on):
    """The correlation of g's answers with those for a blank image and for another case's.

    -> {change: Pearson's r, or None where answers are all alike}
    """

    def answers(**change):
        return inference.estimate_masks(g, replace(masks, **change), on, most=500)[0].ravel()

    usual = answers()
    blank = replace(masks.samples, image=0 * masks.samples.image, mean=0 * masks.samples.mean)
    changed = {
        "blank image": answers(samples=blank),
        "another case's image": answers(index=of_another_case(masks)),
    }
    return {name: metrics.agreement(found, usual)["pearson"] for name, found in changed.items()}


def of_another_case(masks):
    """For each mask a random sample of another case (its own if there is no other). -> [N]"""
    torch.manual_seed(0)
    case = np.unique(masks.samples.case, return_inverse=True)[1]  # number of each sample's
    others = [np.flatnonzero(case != c) for c in range(case.max() + 1)]
    found = []
    for i in masks.index.tolist():
        choice = others[case[i]]
        found.append(int(choice[torch.randint(len(choice), ())]) if len(choice) else i)
    return torch.tensor(found)


def report_text(report, run, data, args):
    """The report for the screen and qp.md."""
    selected = []
    if args.head == "dense":
        selected.append("its temperature")
    if args.select == "best":
        selected.append("the epoch")
    dependence = ", ".join(
        f"{name} {'-' if r is None else f'{r:.3f}'}" for name, r in report.image_dependence.items()
    )
    return (
        f"Quality predictor for {data.info.name}, of epoch {run.best['epoch']}: predicted against "
        f"true Dice on val, which also chose {' and '.join(selected) or 'nothing'}\n\n"
        f"{markdown(report.rows)}\n\n"
        f"Dependence on the image: correlation of g's answers with those for a {dependence} "
        "(the paper asks for less than .7)\n"
    )


def write_report(report, text, run, data, args):
    """Writes qp.md, qp.json and qp.png."""
    numbers = dict(
        rows=report.rows,
        image_dependence=report.image_dependence,
        best=run.best,
        args=vars(args),
    )
    write_text(os.path.join(args.out, "qp.md"), text)
    write_text(os.path.join(args.out, "qp.json"), json.dumps(numbers, indent=1))
    figures.quality(os.path.join(args.out, "qp.png"), report.panels, data.classes)


BLIND = 0.1  # correlation of g's answers with the truth below which g has learned nothing


def is_blind(predicted, true):
    """Whether answers hardly follow the true Dice of masks of all qualities. [N, K-1] both"""
    if true.std() < 1e-3:  # nothing to follow
        return False
    r = metrics.agreement(predicted.ravel(), true.ravel())["pearson"]
    return r is None or r < BLIND


def keep_verdict(args, blind):
    """Adds to qp.pt whether its g has learned nothing; load_quality() then says so."""
    path = os.path.join(args.out, "qp.pt")
    state = checkpoints.load_checkpoint(path, "qp")
    save_checkpoint(path, **state | dict(blind=blind))


# -------------------------------------------------------------------------- data, networks, saving


def load_data(info, args):
    """The masks of vqm.h5 on the grid that g sees. -> Data"""
    size = args.size and loading.network_grid(info, args.size)
    shrink = 2 if args.head == "dense" else 1
    load = quality_masks.load
    train = load(args.vqm, "train", info, size, probabilities=args.soft > 0, shrink=shrink)
    synthetic = load(args.vqm, "val", info, size, shrink=shrink)
    real = load(args.vqm, "real", info, size, shrink=shrink)
    if train.flip:
        flip = checkpoints.flip_of(args.vqm, info, vars(train))
        checkpoints.note_other_flips(args.vqm, "its networks have", flip, "g", [args.flip])
    held = supervision.held_classes(info, "val", real.samples.case)
    data = Data(info, train, synthetic, real, held)
    if absent := [c for c in info.classes if c not in data.classes]:
        print(f"note: {without(absent, 'val')}: left out of all that val selects")
    return data


def build_network(data, args, pretrained):
    """An untrained g. pretrained: it starts from --encoder-weights"""
    info = data.info
    seen = tuple(data.train.mask.shape[1:])  # *S
    shape = dict(
        channels=info.channels,
        classes=len(info.classes),
        dims=info.dims,
        size=seen[0] if info.dims == 2 else seen,
        width=args.width,
    )
    if args.head == "dense":
        members = dict(members=args.members, mask_dropout=args.mask_dropout)
        return models.build("quality_dense", **shape, **members)
    net = models.build("quality", **shape, dropout=args.dropout)
    if pretrained:
        print(checkpoints.load_encoder(net, args.encoder_weights))
    return net


def build_run(data, args, on, state, inputs):
    """A run at its start, or where the checkpoint `state` left it. inputs: see Run"""
    torch.manual_seed(args.seed)
    pretrained = bool(args.encoder_weights) and not state
    net = distributed.synced(on.place(build_network(data, args, pretrained))).train()
    g = copy.deepcopy(net).eval().requires_grad_(False)
    if args.compile:
        for part in net.members if args.head == "dense" else [net.backbone]:
            compiled(part)
    decay = args.weight_decay
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=decay, fused=True)
    of_each = len(data.train.mask) // len(data.train.samples)  # masks of a slice or patch
    masks = len(data.train.samples) * min(args.per_image, of_each)  # of an epoch
    steps = len(own_batches(torch.arange(masks), args.batch))
    if not steps:
        raise InputError(
            f"{args.vqm}: an epoch has {masks} mask(s), too few for a step of batch norm by "
            f"{distributed.world()} process(es); give a larger --per-image, or more labels"
        )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
    run = Run(net, g, optimizer, schedule, on.scaler(), on, steps, inputs)
    run.start = time.perf_counter()
    if state:
        restore(run, state)
    return run


def restore(run, state):
    """Sets a run to the state of last.pt."""
    run.net.load_state_dict(state["net"])
    run.g.load_state_dict(state["weights"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    restore_scaler(run.scaler, state)
    run.epoch = state["epoch"]
    run.best = state["best"]
    run.losses = [*state["losses"].to(run.on.device)]
    run.start -= state["seconds"]


def save_g(run, data, args, name="qp.pt", **more):
    """Writes OUT/qp.pt, or another checkpoint that holds g and more; one process does."""
    if distributed.rank() > 0:
        return
    save_checkpoint(
        os.path.join(args.out, name),
        "qp",
        model=run.g.config,
        weights=run.g.state_dict(),
        args=vars(args),
        best=run.best,
        epoch=run.epoch,
        labeled=sorted(set(data.train.samples.case)),
        patch=data.train.patch,
        data=data.info.describe(),
        **more,
    )


def save_run(run, data, args, losses=None, finished=False):
    """Writes OUT/last.pt, from which --resume goes on. losses: of an epoch that is under way"""
    save_g(
        run,
        data,
        args,
        "last.pt",
        net=run.net.state_dict(),
        optimizer=run.optimizer.state_dict(),
        schedule=run.schedule.state_dict(),
        scaler=run.scaler.state_dict(),
        finished=finished,
        inputs=run.inputs,
        losses=torch.zeros(0) if losses is None else losses.cpu(),
        seconds=time.perf_counter() - run.start,
    )


def leave_if_stopped(stop, run, data, args):
    """Ends all processes if a signal came to one, and keeps what they have done in last.pt.

    stop: of postponed_signals().
    """
    code = distributed.largest(stop())
    if not code:
        return
    if run.losses:
        save_run(run, data, args, mean_losses(run))
        done = f"in epoch {run.epoch + 1}; {args.out}/last.pt holds its {len(run.losses)} steps"
    else:
        done = f"after epoch {run.epoch}; {args.out}/last.pt holds it"
    print(f"stopped {done}: go on with --resume")
    distributed.wait()  # until it is written: torchrun ends all when one has left
    sys.exit(code)


# -------------------------------------------------------------------------------- options and main


# fmt: off
def parse_args(argv=None):
    p = Parser(__doc__, prog="train_qp.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("--vqm", required=True, help="masks of variable quality, from corrupt.py")
    p.add_argument("--out", type=folder, required=True, help="folder of the run")
    p.add_argument("--size", type=grid,
                   help="side of the images that g sees, or D,H,W that patches are resized to "
                        "(default: the masks' own; of slices larger than 64, with --head dense, "
                        "half of it, but at least 64: enough to estimate Dice; for --correct, f's "
                        "own side may be better)")
    p.section("network")
    p.add_argument("--head", choices=HEADS, default="dense",
                   help="dense: image, mask -> truth -> expected Dice; scalar: the paper's "
                        "ResNet-18")
    p.add_argument("--width", type=number(1, 256),
                   help="channels of the first stage (default: dense 16, scalar 64; of volumes 8 "
                        "and 32)")
    p.add_argument("--members", type=number(1, 64), default=3,
                   help="dense: U-Nets whose predictions of the truth are averaged")
    p.add_argument("--mask-dropout", type=SHARE, default=0.5,
                   help="dense: share of training samples whose mask is withheld")
    p.add_argument("--quality-loss", type=number(0, 1e6, float), default=1.0,
                   help="dense: weight of the error in Dice beside that in pixels")
    p.add_argument("--dropout", type=number(0, 0.99, float), default=0.15,
                   help="scalar: share of features that are dropped before the last layer")
    p.add_argument("--encoder-weights", "--pretrained", metavar="FILE",
                   help="scalar: ResNet-18 state dict of torchvision or timm to start from; or "
                        "the word imagenet, which downloads torchvision's")
    p.section("training (epochs, masks, batch, decay and patience are the paper's)")
    p.add_argument("--epochs", type=number(1), default=150,
                   help="epochs at most; with --select best fewer, see --patience")
    p.add_argument("--per-image", type=number(1), default=50,
                   help="masks of each slice or patch in an epoch")
    p.add_argument("--batch", type=number(2, 65_536),
                   help="masks in a step (default: 32, of volumes 4)")
    p.add_argument("--lr", type=number(0, 10, float),
                   help="AdamW, cosine schedule (default: dense 1e-3, scalar 3e-4)")
    p.add_argument("--ema", type=number(0, 0.999999, float), default=0.99,
                   help="decay of g, the moving average of the trained weights; 0: no average")
    p.add_argument("--weight-decay", type=number(0, 10, float), default=5e-4, help="of AdamW")
    p.add_argument("--select", choices=("last", "best"),
                   help="keep the last epoch, or the best on val's real outputs (default: dense "
                        "last, scalar best)")
    p.add_argument("--patience", type=number(1), default=25,
                   help="--select best: epochs without a better one before stopping")
    p.add_argument("--strength", type=SHARE, default=0.5,
                   help="augmentation: intensity, rotation, scale and shift; 0: flips alone")
    p.add_argument("--flip", type=flip_axes, metavar="AXES",
                   help="axes along which images and masks may be flipped: H,W or H or none "
                        "(default: all; give stages 1 to 3 the same)")
    p.add_argument("--soft", type=SHARE, default=0.3,
                   help="share of masks shown soft (blurred, or a weak network's probabilities)")
    p.section("running")
    p.add_argument("--seed", type=SEED, default=0, help="of all random numbers")
    p.add_argument("--device", type=device_name, default="auto",
                   help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
                   help="mixed precision")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile g: slow to start, then faster on GPUs")
    p.add_argument("--deterministic", action="store_true",
                   help="the same weights each time also on a GPU, at a price (on a CPU they are "
                        "anyway)")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt if it is there")
    p.add_argument("--overwrite", action="store_true", help="replace the run that OUT holds")
    args = p.parse_args(argv)
    if args.encoder_weights and args.head != "scalar":
        raise InputError("--encoder-weights are those of a ResNet-18, which only --head scalar has")
    # models/resnet.py says so, too, but only after the masks are read.
    if args.head == "scalar" and (args.width or 8) < 8:
        raise InputError(f"--width {args.width}: --head scalar needs at least 8 channels")
    return args
# fmt: on


def print_idle(args):
    """A note on options that the head does not look at."""
    names = ["dropout"] if args.head == "dense" else ["members", "mask_dropout", "quality_loss"]
    names += ["patience"] if args.select == "last" else []
    plain = parse_args(["DATA", "--vqm=VQM", f"--out={args.out}", "--head", args.head])
    note_idle(args, names, plain)


def set_defaults(args, dims):
    """Fills in what depends on the head and on the data."""
    slices = dims == 2
    if args.head == "dense":
        defaults = dict(width=16 if slices else 8, lr=1e-3, select="last")
    else:
        defaults = dict(width=64 if slices else 32, lr=3e-4, select="best")
    defaults["batch"] = 32 if slices else 4
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def is_over(run, args):
    """Whether all epochs are done, or --patience of them brought nothing better."""
    tired = args.select == "best" and run.epoch - run.best["epoch"] >= args.patience
    return tired or run.epoch >= args.epochs


def print_finished(args, state):
    print(
        f"{args.out}: this run is finished (g of epoch {state['best']['epoch']}; its report "
        f"is {args.out}/qp.md); --overwrite trains it again"
    )


def print_start(run, data):
    """One line: sizes of g and of its data, steps of an epoch, device, processes."""
    masks = data.train.mask
    samples = "slices" if data.info.dims == 2 else "patches"
    size = " x ".join(map(str, masks.shape[1:]))
    processes = distributed.world()
    print(
        f"g: {models.parameters(run.g) / 1e6:.1f} M parameters, "
        f"{len(masks)} masks of {len(data.train.samples)} {samples} of {size}, "
        f"{run.steps} steps an epoch, {run.on}"
        + (f", {processes} processes" if processes > 1 else "")
    )


def print_end(blind, text, data, args):
    """The report, the files, and the next command; a warning first where g is blind."""
    if blind:
        print(
            "warning: g hardly tells good from bad masks of val (Pearson's r is below "
            f"{BLIND}), so it has learned nothing; try more --epochs or masks, and look at the "
            f"labels (python -m data.h5 {shlex.quote(args.data)} --preview FILE.png)"
        )
    print(f"\n{text}\nwrote {args.out}/qp.pt, last.pt, log.csv, qp.md, qp.json, qp.png")
    own = data.train.own if data.info.dims == 3 else data.train.own[:1]
    command = ["python", "train_ssl.py", args.data, "--labeled", *data.train.spec.split()]
    command += ["--size", ",".join(map(str, own)), "--method", "mean_teacher"]
    command += ["--weight", "quality"]
    if args.flip:
        command += ["--flip", args.flip]
    command += ["--qp", f"{args.out}/qp.pt"]
    command += ["--out", os.path.join(os.path.dirname(args.out), "mt_qw")]
    print(f"next: {shlex.join(command)}")


def main(argv=None):
    args = parse_args(argv)
    on = compute(args.device, args.amp, args.deterministic)
    info = h5.read_info(args.data)
    distributed.start(on.device)
    set_defaults(args, info.dims)
    args.flip = h5.check_flip(info, args.flip)
    distributed.check_share("--batch", args.batch)
    lock = checkpoints.lock_folder(args.out)  # noqa: F841 (until main ends)
    state, inputs = start_run("qp", args, info.describe(), inputs=("vqm",))
    if state and state["finished"]:
        print_finished(args, state)
        return

    data = load_data(info, args)

    run = build_run(data, args, on, state, inputs)
    distributed.wait()  # until all have looked at what is in OUT
    # The first column counts epochs. Its name is what readers of all logs look for.
    columns = ["step", "loss", "lr", "error_synthetic", "error_real", "seconds"]
    writes = distributed.rank() == 0
    former = [] if state else checkpoints.files_of_run("qp", args.out)
    log = Log(args.out, columns, run.epoch, writes=writes, former=former, counts="epoch")
    print_start(run, data)
    print_idle(args)

    with postponed_signals() as stop:
        while not is_over(run, args):
            loss, rate = train_epoch(run, data, args, stop)
            if args.head == "dense":
                fit_temperature(run.g, data.real, on, data.held)
            error_synthetic = mean_error(run.g, data.synthetic, data, on)
            error_real = mean_error(run.g, data.real, data, on)
            if error_real < run.best["error"] or args.select == "last":
                run.best = {"error": error_real, "epoch": run.epoch}
                save_g(run, data, args)
            log.write(
                run.epoch,
                loss=loss,
                lr=rate,
                error_synthetic=error_synthetic,
                error_real=error_real,
                seconds=time.perf_counter() - run.start,
            )
            run.start = time.perf_counter()
            save_run(run, data, args)
            leave_if_stopped(stop, run, data, args)

    distributed.wait()  # for qp.pt
    kept, _ = checkpoints.load_quality(os.path.join(args.out, "qp.pt"), info, on)
    report = make_report(kept, data, on)
    predicted, true, _ = report.panels["synthetic masks"]
    blind = bool(is_blind(predicted, true))
    text = report_text(report, run, data, args)
    if writes:
        write_report(report, text, run, data, args)
        keep_verdict(args, blind)
    save_run(run, data, args, finished=True)
    distributed.wait()  # until everything is written
    print_end(blind, text, data, args)


if __name__ == "__main__":
    cli(main)
