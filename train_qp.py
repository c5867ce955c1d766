"""Stage 2: trains the quality predictor g(image, mask) -> Dice of each foreground class.

    python train_qp.py DATA.h5 --vqm runs/vqm/vqm.h5 --out runs/qp
    torchrun --nproc_per_node=4 train_qp.py ...    # the same training, each step's --batch shared by four processes, or GPUs

Reads  DATA.h5 (images, and labels of the cases that vqm.h5 names), vqm.h5 of corrupt.py.
Writes OUT/qp.pt (g), OUT/last.pt (to --resume), OUT/log.csv, TensorBoard events, and the report on val: OUT/qp.json, OUT/qp.md, OUT/qp.png.

g answers with the smoothed Dice (models/quality.py) of the mask that it sees, hard or soft, after augmentation. --head dense predicts the
truth from image and mask, and reads off the mask's expected Dice; --head scalar, the paper's, regresses it. The report tells apart
synthetic masks and real outputs: predictions of the weak networks on val cases, which none of them has seen.

Legend: N masks, B batch, K classes, C channels, *S the grid that g sees: S, S of slices, or D, H, W of patches of volumes.
"""

import copy
import itertools
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import models
from data import augment, figures, h5, loading, metrics, quality_masks
from data.files import InputError, claim
from data.log import Log
from data.options import SEED, SHARE, Parser, cli, flip_axes, folder, grid, number, seed_of
from data.tables import markdown, write_text
from data.workers import postponed_signals
from models import checkpoints, distributed, inference
from models.checkpoints import check_finite, save_checkpoint, start_run
from models.device import Compute, channels_last, compiled, compute, device_name, samples_in
from models.ema import update_average
from models.losses import one_hot, seg_loss
from models.quality import quality_target, resample, true_dice, with_background


def parse_args(argv=None):
    p = Parser(__doc__, prog="train_qp.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("--vqm", required=True, help="masks of variable quality, from corrupt.py")
    p.add_argument("--out", type=folder, required=True, help="folder of the run")
    p.add_argument(
        "--size",
        type=grid,
        help="side of the images that g sees, or D,H,W that patches are resized to (default: "
        "the masks' own; of slices, with --head dense, half of it, measured no worse)",
    )
    p.section("network")
    p.add_argument(
        "--head",
        choices=HEADS,
        default="dense",
        help="dense: image, mask -> truth -> expected Dice; scalar: the paper's ResNet-18",
    )
    p.add_argument(
        "--width",
        type=number(1, 256),
        help="channels of the first stage (default: dense 16, scalar 64; of volumes 8 and 32)",
    )
    p.add_argument(
        "--members",
        type=number(1, 64),
        default=3,
        help="dense: U-Nets whose predictions of the truth are averaged",
    )
    p.add_argument(
        "--mask-dropout",
        type=SHARE,
        default=0.5,
        help="dense: share of training samples whose mask is withheld",
    )
    p.add_argument(
        "--quality-loss",
        type=number(0, 1e6, float),
        default=1.0,
        help="dense: weight of the error in Dice beside that in pixels",
    )
    p.add_argument(
        "--dropout", type=number(0, 0.99, float), default=0.15, help="scalar: before the last layer"
    )
    p.add_argument(
        "--encoder-weights",
        "--pretrained",
        metavar="FILE",
        help="scalar: ResNet-18 state dict of torchvision or timm to start from; or the word "
        "imagenet, which downloads torchvision's",
    )
    p.section("training (epochs, masks, batch, decay and patience are the paper's)")
    p.add_argument("--epochs", type=number(1), default=150, help="at most")
    p.add_argument(
        "--per-image", type=number(1), default=50, help="masks of each slice or patch in an epoch"
    )
    p.add_argument(
        "--batch", type=number(2, 65_536), help="masks in a step (default: 32, of volumes 4)"
    )
    p.add_argument(
        "--lr",
        type=number(0, 10, float),
        help="AdamW, cosine schedule (default: dense 1e-3, scalar 3e-4)",
    )
    p.add_argument(
        "--ema",
        type=number(0, 0.999999, float),
        default=0.99,
        help="g is the moving average of the trained weights; 0: they themselves",
    )
    p.add_argument("--weight-decay", type=number(0, 10, float), default=5e-4, help="of AdamW")
    p.add_argument(
        "--select",
        choices=("last", "best"),
        help="keep the last epoch, or the best on val's real outputs (default: dense last, scalar best)",
    )
    p.add_argument(
        "--patience",
        type=number(1),
        default=25,
        help="--select best: epochs without a better one before stopping",
    )
    p.add_argument(
        "--strength",
        type=SHARE,
        default=0.5,
        help="of augmentation: intensity, rotation, scale and shift",
    )
    p.add_argument(
        "--flip",
        type=flip_axes,
        metavar="AXES",
        help="axes along which images and masks may be flipped: H,W or H or none "
        "(default: all; give stages 1 to 3 the same)",
    )
    p.add_argument(
        "--soft",
        type=SHARE,
        default=0.3,
        help="share of masks shown soft (blurred, or a weak network's probabilities)",
    )
    p.section("running")
    p.add_argument("--seed", type=SEED, default=0, help="of everything")
    p.add_argument(
        "--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1, ..."
    )
    p.add_argument(
        "--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision"
    )
    p.add_argument(
        "--compile", action="store_true", help="torch.compile g: slow to start, then faster on GPUs"
    )
    p.add_argument(
        "--deterministic",
        action="store_true",
        help="the same weights each time also on a GPU, at a price (on a CPU they are anyway)",
    )
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt if it is there")
    p.add_argument("--overwrite", action="store_true", help="replace the run that OUT holds")
    args = p.parse_args(argv)
    if args.encoder_weights and args.head != "scalar":
        raise InputError("--encoder-weights are those of a ResNet-18, which only --head scalar has")
    if (
        args.head == "scalar" and (args.width or 8) < 8
    ):  # as models/resnet.py says, but before masks are read
        raise InputError(f"--width {args.width}: --head scalar needs at least 8 channels")
    return args


def set_defaults(args, dims):
    """Fills in what depends on the head and on the data."""
    defaults = {
        "dense": dict(width={2: 16, 3: 8}, lr=1e-3, select="last"),
        "scalar": dict(width={2: 64, 3: 32}, lr=3e-4, select="best"),
    }[args.head]
    for name, value in (defaults | dict(batch={2: 32, 3: 4})).items():
        if getattr(args, name) is None:
            setattr(args, name, value[dims] if isinstance(value, dict) else value)


# ---------------------------------------------------------------------------------------------------- batches


def epoch_rows(masks, per_image):
    """Random mask numbers for an epoch: per_image of every sample, shuffled. -> [samples * per_image]"""
    rows = torch.argsort(
        masks.index + 0.999 * torch.rand(len(masks.index), dtype=torch.float64)
    )  # by sample, random inside
    rows = rows.reshape(len(masks.samples), -1)[:, :per_image].flatten()
    return rows[torch.randperm(len(rows))]


def draw(masks, rows, K, device, args):
    """One augmented batch. -> image [B, C, *S], mask [B, K-1, *S] hard or soft, truth [B, K-1, *S]

    Geometry moves image, mask and truth together, intensity changes the image alone. A share --soft of the masks is soft: a weak
    network's probabilities where there are some, else a blurred mask.
    """
    x, y = masks.samples.batch(masks.index[rows], device)
    s = args.strength
    way = augment.random_geometry(x, rotate=45 * s, scale=0.3 * s, shift=0.15 * s, flip=args.flip)
    mask, truth = (
        one_hot(augment.move(v.to(device), way), K)[:, 1:] for v in (masks.mask[rows].long(), y)
    )
    chosen = torch.rand(len(rows)) < args.soft
    harvested = chosen & (masks.prob_index[rows] >= 0)
    if harvested.any():
        p = (
            torch.stack([masks.prob[i] for i in masks.prob_index[rows][harvested].tolist()])
            .to(device)
            .float()
            / 255
        )
        at = harvested.nonzero()[:, 0].to(device)
        mask[at] = augment.move(p, way[at])
    if (blurred := chosen & ~harvested).any():
        at, most = blurred.nonzero()[:, 0].to(device), 0.02 * mask.shape[-1] + 0.5
        mask[at] = augment.blur(mask[at], augment.uniform(0.5, most, mask[at]), most)
    return augment.strong(augment.move(x, way), args.strength), mask, truth


# ---------------------------------------------------------------------------------------------------- the two heads' losses
# loss(g, views, args) -> a number. views: (x [B, C, *S], mask [B, K-1, *S], truth [B, K-1, *S]) of one batch, augmented anew in each


def scalar_loss(g, views, args):
    """Smooth L1 between g(image, mask) and the smoothed Dice of that mask."""
    x, mask, truth = views[0]
    return F.smooth_l1_loss(g(x, mask), quality_target(mask, truth))


def dense_loss(g, views, args):
    """Each member segments the truth, from a view of its own that shows the mask or withholds it: (cross-entropy + soft Dice) / 2, and
    Smooth L1 between the expected Dice that is read off its answer and the smoothed Dice of the mask."""
    total = 0.0
    for member, (x, mask, truth) in zip(g.members, views):
        withheld = (torch.rand(len(x), device=x.device) < args.mask_dropout).float()
        logits = member(channels_last(g.show(x, mask, withheld)))  # [B, K, *S]
        expected = quality_target(mask, logits.float().softmax(1)[:, 1:])  # [B, K-1]
        total = total + (
            seg_loss(logits, with_background(truth))
            + args.quality_loss * F.smooth_l1_loss(expected, quality_target(mask, truth), beta=0.1)
        )
    return total


HEADS = {"dense": dense_loss, "scalar": scalar_loss}


# ---------------------------------------------------------------------------------------------------- one training step


@dataclass
class Run:
    """What a step changes, and where it runs."""

    net: torch.nn.Module  # what is trained
    g: torch.nn.Module  # its moving average, in eval mode: what is kept
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    on: Compute


def train_step(run, masks, rows, args, step):
    """One optimizer step on the masks of some rows. -> loss (a tensor)"""
    K = run.net.config["classes"]
    views = [
        draw(masks, rows, K, run.on.device, args)
        for _ in range(args.members if args.head == "dense" else 1)
    ]
    with run.on.autocast():
        loss = HEADS[args.head](run.net, views, args)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    distributed.average_gradients(run.net.parameters())
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.schedule.step()
    update_average(
        run.g, run.net, step, args.ema
    )  # g's temperature, too; it is fitted before g is asked or kept
    return loss.detach()


TEMPERATURES = torch.logspace(
    0, 2, 9, base=2
)  # 1 to 4; below 1, g would only get surer of itself for val's sake


@torch.no_grad()
def fit_temperature(g, masks, on, held, most=300):
    """Sets a dense g's temperature to that of the least mean error in Dice on masks, evenly thinned out to `most`. (Guo et al., ICML 2017,
    fit it by likelihood.) held: h5.held_classes() of val; no other class counts"""
    errors, rows = [], inference.thinned(len(masks.mask), most)
    for rows in rows[distributed.rank() :: distributed.world()].split(
        samples_in(16, masks.mask.shape[1:])
    ):
        x, y = masks.samples.batch(masks.index[rows], on.device)
        mask, truth = (
            one_hot(v.to(on.device), g.config["classes"])[:, 1:] for v in (masks.mask[rows], y)
        )
        with on.autocast():
            logits = g.logits(x, mask)  # [M, V, B, K, *S]
        mask, true = resample(mask, g.size), true_dice(mask, truth)
        error = [
            (quality_target(mask, (logits / t).softmax(3).mean((0, 1))[:, 1:]) - true).abs()
            for t in TEMPERATURES
        ]  # [N, K-1] each
        errors += torch.stack([e[:, held].sum(1) for e in error], 1).cpu()
    g.temperature.fill_(TEMPERATURES[torch.stack(distributed.gather(errors)).sum(0).argmin()])


# ---------------------------------------------------------------------------------------------------- report


def of_another_case(masks):
    """For each mask a random sample of another case (of its own if there is no other). -> [N]"""
    torch.manual_seed(0)
    case = np.unique(masks.samples.case, return_inverse=True)[1]
    others = [np.flatnonzero(case != c) for c in range(case.max() + 1)]
    return torch.tensor(
        [
            int(others[c][torch.randint(len(others[c]), ())]) if len(others[c]) else i
            for i, c in ((int(i), case[i]) for i in masks.index)
        ]
    )


def report(g, synthetic, real, classes, held, on):
    """Rows for Markdown and JSON: agreement on (a) synthetic masks, (b) real outputs; (c) dependence on the image.
    classes: the background's name, and those that val's labels hold; held: which of all these are"""
    rows, panels = [], {}
    for title, masks in (("synthetic masks", synthetic), ("real outputs", real)):
        seen = [v[:, held] for v in inference.estimate_masks(g, masks, on, most=2000)]
        rows += metrics.quality_rows(title, *seen, classes)
        panels[title] = seen[:2]
    blind = {
        "blank image": dict(change=torch.zeros_like),
        "another case's image": dict(index=of_another_case(synthetic)),
    }
    sighted = inference.estimate_masks(g, synthetic, on, most=500)[0].ravel()
    image_dependence = {
        name: metrics.agreement(
            inference.estimate_masks(g, synthetic, on, most=500, **how)[0].ravel(), sighted
        )["pearson"]
        for name, how in blind.items()
    }
    return rows, panels, image_dependence


BLIND = 0.1  # correlation of g's answers with the truth below which g has learned nothing


def is_blind(predicted, true):
    """Whether answers [N, K-1] hardly follow the true Dice of masks of all qualities."""
    if true.std() < 1e-3:  # nothing to follow
        return False
    r = metrics.agreement(predicted.ravel(), true.ravel())["pearson"]
    return r is None or r < BLIND


# ---------------------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse_args(argv)
    on, info = compute(args.device, args.amp, args.deterministic), h5.read_info(args.data)
    distributed.start(on.device)
    set_defaults(args, info.dims)
    args.flip = h5.check_flip(info, args.flip)
    if args.batch % distributed.world():
        raise InputError(
            f"--batch {args.batch}: cannot be shared evenly by {distributed.world()} processes"
        )
    held = claim(args.out) if distributed.rank() == 0 and os.path.isdir(args.out) else None  # noqa: F841  (until main ends)
    resumed, inputs = start_run("qp", args, info.describe(), inputs=("vqm",))
    if resumed and resumed["finished"]:
        print(
            f"{args.out}: this run is finished (g of epoch {resumed['best']['epoch']}; its report is {args.out}/qp.md); --overwrite trains it again"
        )
        return
    size = args.size and loading.network_grid(info, args.size)
    shrink = 2 if args.head == "dense" else 1
    train = quality_masks.load(args.vqm, "train", info, size, args.soft > 0, shrink)
    synthetic, real = (
        quality_masks.load(args.vqm, split, info, size, shrink=shrink) for split in ("val", "real")
    )
    seen = tuple(train.mask.shape[1:])
    held = h5.held_classes(info, "val", real.samples.case)
    classes = [info.classes[0], *itertools.compress(info.classes[1:], held)]
    if absent := [c for c in info.classes if c not in classes]:
        print(f"note: {h5.without(absent, 'val')}: left out of all that val selects")

    torch.manual_seed(args.seed)
    shape = dict(
        channels=info.channels,
        classes=len(info.classes),
        dims=info.dims,
        size=seen[0] if info.dims == 2 else seen,
        width=args.width,
    )
    if args.head == "dense":
        net = models.build(
            "quality_dense", **shape, members=args.members, mask_dropout=args.mask_dropout
        )
    else:
        net = models.build("quality", **shape, dropout=args.dropout)
        if args.encoder_weights and not resumed:
            print(checkpoints.load_encoder(net, args.encoder_weights))
    net = distributed.synced(on.place(net)).train()
    g = copy.deepcopy(net).eval().requires_grad_(False)
    if args.compile:
        for part in net.members if args.head == "dense" else [net.backbone]:
            compiled(part)
    optimizer = torch.optim.AdamW(
        net.parameters(), args.lr, weight_decay=args.weight_decay, fused=True
    )
    steps = -(
        -len(train.samples)
        * min(args.per_image, len(train.mask) // len(train.samples))
        // args.batch
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
    run = Run(net, g, optimizer, schedule, on.scaler(), on)
    first, best, losses, seconds = (
        0,
        dict(error=float("inf"), epoch=0),
        [],
        0.0,
    )  # losses: those of each step of an epoch that was stopped
    if resumed:
        for name, part in (
            ("net", net),
            ("weights", g),
            ("optimizer", optimizer),
            ("schedule", schedule),
            ("scaler", run.scaler),
        ):
            part.load_state_dict(resumed[name])
        first, best, losses, seconds = (
            resumed["epoch"],
            resumed["best"],
            [*resumed["losses"].to(on.device)],
            resumed["seconds"],
        )
    distributed.wait()  # until all have looked at what is in OUT
    log = Log(
        args.out,
        ["step", "loss", "lr", "error_synthetic", "error_real", "seconds"],
        first,
        writes=distributed.rank() == 0,
        fresh=not resumed,
    )
    print(
        f"g: {models.parameters(g) / 1e6:.1f} M parameters, {len(train.mask)} masks of {len(train.samples)} {'slices' if info.dims == 2 else 'patches'} of "
        f"{' x '.join(map(str, seen))}, {steps} steps an epoch, {on}"
        + (f", {distributed.world()} processes" if distributed.world() > 1 else "")
    )

    def mean_loss(step):
        """Of each step of the epoch, over processes. -> [steps]; refuses to go on where one is not finite"""
        means = distributed.mean(torch.stack(losses))
        check_finite(
            means[:, None], ["loss"], [net], step, lambda _: "try --amp off or a lower --lr"
        )
        return means

    def save(name, epoch, losses=torch.zeros(0), finished=False):
        if distributed.rank() == 0:
            more = (
                {}
                if name == "qp.pt"
                else dict(
                    net=net.state_dict(),
                    optimizer=optimizer.state_dict(),
                    schedule=schedule.state_dict(),
                    scaler=run.scaler.state_dict(),
                    finished=finished,
                    inputs=inputs,
                    losses=losses.cpu(),
                    seconds=time.perf_counter() - start,
                )
            )
            save_checkpoint(
                os.path.join(args.out, name),
                "qp",
                model=g.config,
                weights=g.state_dict(),
                args=vars(args),
                best=best,
                epoch=epoch,
                labeled=sorted(set(train.samples.case)),
                patch=train.patch,
                data=info.describe(),
                **more,
            )

    epoch, start, (rank, world) = (
        first,
        time.perf_counter() - seconds,
        (distributed.rank(), distributed.world()),
    )
    with postponed_signals() as stop:
        while epoch < args.epochs and not (
            args.select == "best" and epoch - best["epoch"] >= args.patience
        ):
            epoch += 1
            torch.manual_seed(seed_of(args.seed, epoch, 0))
            order = epoch_rows(train, args.per_image)
            batches = [
                rows[: len(rows) // world * world][rank::world]
                for rows in order.split(args.batch)
                if len(rows) >= max(2, world)
            ]  # batch norm needs two
            bar = tqdm(
                batches[len(losses) :],
                desc=f"epoch {epoch}",
                unit=" steps",
                leave=False,
                disable=not sys.stderr.isatty() or rank > 0,
            )
            for step, rows in enumerate(bar, (epoch - 1) * steps + len(losses) + 1):
                torch.manual_seed(seed_of(args.seed, step, 1 + rank))
                losses.append(train_step(run, train, rows, args, step))
                if code := distributed.largest(stop()):
                    save("last.pt", epoch - 1, mean_loss(step))
                    print(
                        f"stopped in epoch {epoch}; {args.out}/last.pt holds its {len(losses)} steps: go on with --resume"
                    )
                    distributed.wait()  # until it is written: torchrun ends all when one has left
                    sys.exit(code)
            loss = mean_loss((epoch - 1) * steps + len(losses)).mean().item()
            if args.head == "dense":
                fit_temperature(g, real, on, held)
            errors = [
                float(np.abs(p - t)[:, held].mean())
                for p, t, _ in (
                    inference.estimate_masks(g, masks, on, most=300) for masks in (synthetic, real)
                )
            ]
            if errors[1] < best["error"] or args.select == "last":
                best = dict(error=errors[1], epoch=epoch)
                save("qp.pt", epoch)
            log.write(
                epoch,
                loss=loss,
                lr=optimizer.param_groups[0]["lr"],
                error_synthetic=errors[0],
                error_real=errors[1],
                seconds=time.perf_counter() - start,
            )
            losses, start = [], time.perf_counter()
            save("last.pt", epoch)
            if code := distributed.largest(stop()):  # it came during the validation
                distributed.wait()
                print(
                    f"stopped after epoch {epoch}; {args.out}/last.pt holds it: go on with --resume"
                )
                sys.exit(code)

    distributed.wait()  # for qp.pt
    kept, _ = checkpoints.load_quality(os.path.join(args.out, "qp.pt"), info, on)
    rows, panels, image_dependence = report(kept, synthetic, real, classes, held, on)
    chosen = (
        " and ".join(
            ["its temperature"] * (args.head == "dense") + ["the epoch"] * (args.select == "best")
        )
        or "nothing"
    )
    text = (
        f"Quality predictor for {info.name}, of epoch {best['epoch']}: predicted against true Dice on val, which also chose {chosen}\n\n"
        f"{markdown(rows)}\n\nDependence on the image: correlation of g's answers with those for a "
        + ", ".join(
            f"{name} {'-' if r is None else f'{r:.3f}'}" for name, r in image_dependence.items()
        )
        + " (the paper asks for less than .7)\n"
    )
    if distributed.rank() == 0:
        write_text(os.path.join(args.out, "qp.md"), text)
        write_text(
            os.path.join(args.out, "qp.json"),
            json.dumps(
                dict(rows=rows, image_dependence=image_dependence, best=best, args=vars(args)),
                indent=1,
            ),
        )
        figures.quality(os.path.join(args.out, "qp.png"), panels, classes)
    save("last.pt", epoch, finished=True)
    distributed.wait()  # until everything is written
    if is_blind(*panels["synthetic masks"]):
        print(
            "warning: g hardly tells good from bad masks of val (Pearson's r is below "
            f"{BLIND}), so it has learned nothing; try more --epochs or masks, and look at the "
            f"labels (python -m data.h5 {shlex.quote(args.data)} --preview FILE.png)"
        )
    print(
        f"\n{text}\nwrote {args.out}/qp.pt, last.pt, log.csv, qp.md, qp.json, qp.png\n"
        "next: "
        + shlex.join(
            [
                "python",
                "train_ssl.py",
                args.data,
                "--labeled",
                *train.spec.split(),
                "--size",
                ",".join(map(str, train.own if info.dims == 3 else train.own[:1])),
                "--method",
                "mean_teacher",
                "--weight",
                "quality",
                *(["--flip", args.flip] if args.flip else []),
                "--qp",
                f"{args.out}/qp.pt",
                "--out",
                os.path.join(os.path.dirname(args.out), "mt_qw"),
            ]
        )
    )


if __name__ == "__main__":
    cli(main)
