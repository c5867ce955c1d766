"""Stage 3: semi-supervised training of a segmentation network f, guided by the frozen quality predictor g.

    python train_ssl.py DATA.h5 --out runs/mt_qw --labeled 7 --method mean_teacher --weight quality --qp runs/qp/qp.pt
    torchrun --nproc_per_node=4 train_ssl.py ...    # the same training, each step's --batch shared by four processes, or GPUs

Reads  DATA.h5: labels of the labeled train cases and of val; images of all other train cases, of the split `unlabeled`, and of
       --unlabeled OTHER.h5; with --weight quality, --correct or --qar also the qp.pt of train_qp.py.
Writes OUT/best.pt (the best on val since unlabeled images came in), OUT/last.pt (to --resume), OUT/step*.pt (with --keep), OUT/log.csv, TensorBoard events.

One step:  L = L_sup + lambda(t) sum(w l) / sum(w) + lambda_qar(t) QAR,    over the pixels of a batch, l the loss and w the weight of a pixel
           QW   w = q^2 [q >= .5], q = g(u_i, pseudo-label of u_i) for all pixels of image u_i, or of each pixel by itself
           --correct: what g believes to be the truth, having seen u_i and its pseudo-label, takes that one's place, and q_i is
           the Dice that it expects of it
           QAR  1 - g(u, softmax f(u)), whose gradient flows through g into f

Legend: B batch, U unlabeled batch, K classes, C channels, *S the grid that f sees: S, S of slices, or D, H, W of patches of volumes; x, y labeled
images and labels, u unlabeled images, s1, s2 strong views of u.
"""

import argparse
import bisect
import copy
import functools
import itertools
import math
import operator
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from typing import Callable

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import models
from data import augment, figures, h5, loading, metrics, workers
from data.files import InputError, claim
from data.log import Log
from data.options import SEED, SHARE, Parser, cli, flip_axes, folder, grid, number, numbers, seed_of
from data.workers import postponed_signals
from models import checkpoints, distributed, inference
from models.checkpoints import check_finite, save_checkpoint, start_run
from models.device import Compute, channels_last, compiled, compute, device_name, fused
from models.ema import update_average
from models.losses import mse_loss, one_hot, pixel_contrast, seg_loss, to_samples, weighted_mean
from models.quality import quality_target
from models.resnet import RESNETS


def parse_args(argv=None):
    p = Parser(__doc__, prog="train_ssl.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("--out", type=folder, required=True, help="folder of the run")
    p.section("what is labeled")
    p.add_argument(
        "--labeled",
        default="all",
        help="labeled train patients: a number (7: the first 7), a fraction (0.1) or all",
    )
    p.add_argument("--labeled-seed", type=SEED, help="draw the labeled patients at random")
    p.add_argument(
        "--unlabeled",
        metavar="OTHER.h5",
        help="a second file whose train and unlabeled images join the unlabeled ones",
    )
    p.section("method")
    p.add_argument("--method", choices=METHODS, default="supervised", help="semi-supervised method")
    p.add_argument(
        "--conf-threshold",
        type=SHARE,
        help="pseudo_label, contrastive, fixmatch, unimatch: pixels of lower confidence are left out; 0 keeps "
        f"all ({defaults_of('conf_threshold')})",
    )
    p.add_argument(
        "--lam",
        type=number(0, 1e6, float),
        help=f"lambda: weight of the unlabeled loss after its ramp ({defaults_of('lam')})",
    )
    p.add_argument(
        "--lam-warmup",
        type=SHARE,
        help=f"share of training before the unlabeled loss sets in ({defaults_of('lam_warmup')})",
    )
    p.add_argument(
        "--lam-ramp",
        type=SHARE,
        help=f"share of training over which lambda then grows ({defaults_of('lam_ramp')})",
    )
    p.add_argument(
        "--ema",
        type=number(0, 0.999999, float),
        default=0.99,
        help="decay of the teacher, which starts from the student where lambda sets in",
    )
    p.add_argument(
        "--mc-passes", type=number(1, 1000), default=8, help="ua_mt: noisy passes of the teacher"
    )
    p.add_argument(
        "--mix-alpha",
        type=number(1e-3, 1e3, float),
        default=1.0,
        help="ict: two images are blended by Beta(alpha, alpha)",
    )
    p.add_argument(
        "--contrast-weight",
        type=number(0, 1e6, float),
        default=0.1,
        help="contrastive: weight of the contrast",
    )
    p.add_argument(
        "--temperature",
        type=number(1e-3, 1e3, float),
        default=0.1,
        help="contrastive: of the similarities",
    )
    p.add_argument(
        "--negatives",
        type=number(1, 100_000),
        default=256,
        help="contrastive: pixels of other classes for each class",
    )
    p.add_argument(
        "--paste",
        type=SHARE,
        default=2 / 3,
        help="bcp: side of the pasted box, as a share of the image's",
    )
    p.add_argument(
        "--largest-component",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bcp: a pseudo-label keeps the largest component of each class",
    )
    p.section("quality guidance")
    p.add_argument("--qp", metavar="QP.pt", help="quality predictor of train_qp.py")
    p.add_argument(
        "--weight",
        choices=("none", "confidence", "quality"),
        default="none",
        help="what weights a pseudo-label (QW: quality)",
    )
    p.add_argument(
        "--weight-level",
        choices=("image", "class", "pixel"),
        help="one weight per image, per pixel by its pseudo-class, or per pixel by the chance that it is right (default: image, as in the paper; "
        "of --weight quality with a dense head and without --correct: pixel)",
    )
    p.add_argument("--weight-power", type=number(0, 100, float), default=2.0, help="w = q^power")
    p.add_argument(
        "--weight-threshold",
        type=SHARE,
        help="w = 0 where q is below (default: quality .5, confidence .9)",
    )
    p.add_argument(
        "--correct",
        action="store_true",
        help="g (dense head) corrects pseudo-labels: what it believes to be the truth, having seen one, "
        "takes its place, also for --conf-threshold and --weight",
    )
    p.add_argument(
        "--qar",
        type=number(0, 1e6, float),
        default=0.0,
        help="lambda_qar after its ramp; the paper's value is 0.01",
    )
    p.add_argument(
        "--qar-share",
        type=number(1e-6, 1, float),
        default=1 / 3,
        help="of a step's unlabeled images, those on which QAR is taken (two or more); 1: all, as in the paper",
    )
    p.add_argument(
        "--qar-warmup", type=SHARE, default=0.15, help="share of training before QAR sets in"
    )
    p.add_argument(
        "--qar-ramp",
        type=SHARE,
        default=0.2,
        help="share of training over which lambda_qar then grows",
    )
    p.section("network and training")
    p.add_argument(
        "--model",
        type=models.model_name,
        metavar="NAME",
        help=f"network f: {', '.join(models.segmentation_networks())} (default: unet, of "
        "volumes vnet); smp:UnetPlusPlus is that of segmentation_models_pytorch, if it is installed",
    )
    p.add_argument(
        "--width",
        type=number(1, 256),
        help="channels of the network's first level (default: its own)",
    )
    p.add_argument(
        "--encoder",
        metavar="NAME",
        help=f"of resnet_unet, unetpp, attention_unet: {', '.join(RESNETS)} (default: resnet34)",
    )
    p.add_argument(
        "--encoder-weights",
        metavar="FILE",
        help="state dict to start the encoder from: a ResNet's of torchvision or timm, for swin_unet "
        "the official Swin-T's; or the word imagenet, which downloads torchvision's",
    )
    p.add_argument(
        "--dropout",
        type=number(0, 0.99, float),
        help="vnet: at the bottom and before the head (default: 0.5)",
    )
    p.add_argument(
        "--size",
        type=grid,
        help="side of the images that f sees (default 224); of volumes D,H,W of a patch (default 80,112,112)",
    )
    p.add_argument("--steps", type=number(1), default=6000, help="training steps")
    p.add_argument(
        "--batch",
        type=number(1, 65_536),
        help="labeled images in a step (default 32, of volumes 2)",
    )
    p.add_argument(
        "--batch-unlabeled",
        type=number(1, 65_536),
        help="unlabeled images in a step (default 64, of volumes 2)",
    )
    p.add_argument(
        "--strength",
        type=number(0, 2, float),
        default=0.5,
        help="of the intensity augmentation of labeled images; that of strong views is 1",
    )
    p.add_argument(
        "--flip",
        type=flip_axes,
        metavar="AXES",
        help="axes along which images may be flipped: H,W or H or none "
        "(default: all; give stages 1 to 3 the same)",
    )
    p.add_argument(
        "--optimizer",
        choices=("adamw", "sgd"),
        default="adamw",
        help="adamw: cosine; sgd: momentum .9, poly .9",
    )
    p.add_argument(
        "--lr",
        type=number(0, 10, float),
        default=1e-3,
        help="initial learning rate (sgd: 0.01 is usual; with --encoder-weights 1e-4)",
    )
    p.add_argument(
        "--weight-decay", type=number(0, 10, float), default=1e-4, help="of the optimizer"
    )
    p.add_argument(
        "--clip", type=number(1e-6, 1e9, float), default=1.0, help="largest norm of the gradient"
    )
    p.add_argument(
        "--eval-every",
        type=number(1),
        default=200,
        help="steps between validations, log rows and checkpoints",
    )
    p.add_argument(
        "--patience",
        type=number(1),
        default=30,
        help="validations without a better Dice before stopping",
    )
    p.add_argument(
        "--keep",
        metavar="N,N,...",
        type=numbers,
        default=[],
        help="also keep the checkpoints of these steps, as OUT/stepN.pt",
    )
    inference.add_window_options(p)
    p.section("running")
    p.add_argument("--seed", type=SEED, default=0, help="of everything but --labeled-seed")
    p.add_argument(
        "--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1, ..."
    )
    p.add_argument(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="auto",
        help="mixed precision; losses, Dice and g's output stay fp32",
    )
    p.add_argument(
        "--cache",
        choices=("auto", "device", "ram", "off"),
        default="auto",
        help="where images are kept: on the device, in memory, or nowhere, but read for each step; auto: the first that they fit into",
    )
    p.add_argument(
        "--workers",
        type=number(0, 1000),
        default=2,
        help="--cache off: processes that read the images of the next steps",
    )
    p.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the networks: slow to start, then faster on GPUs",
    )
    p.add_argument(
        "--deterministic",
        action="store_true",
        help="the same weights each time also on a GPU, at a price (on a CPU they are anyway)",
    )
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt if it is there")
    p.add_argument("--overwrite", action="store_true", help="replace the run that OUT holds")
    args = p.parse_args(argv)
    for name, value in {**PAPER, **DEFAULTS.get(args.method, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.correct and args.method == "supervised":
        raise InputError(
            "--correct: supervised training has no pseudo-label; choose another --method"
        )
    asks = (
        "--weight quality"
        if args.weight == "quality"
        else "--qar"
        if args.qar
        else "--correct"
        if args.correct
        else None
    )
    if asks and not args.qp:
        raise InputError(f"--qp is missing: {asks} needs the qp.pt of train_qp.py")
    if args.weight_threshold is None:
        args.weight_threshold = {"none": 0.0, "confidence": 0.9, "quality": 0.5}[args.weight]
    if args.weight_level is None and args.weight != "quality":  # whose default depends on g
        args.weight_level = "image"
    return args


# ---------------------------------------------------------------------------------------------------- shapes


@dataclass
class Batch:
    """What a method sees. No labels of u."""

    x: torch.Tensor  # [B, C, *S] labeled images, weak view with some change of intensity
    y: torch.Tensor  # [B, K, *S] their labels, one-hot
    u: torch.Tensor  # [U, C, *S] unlabeled images, weak view
    s1: torch.Tensor  # [U, C, *S] two strong views of u: other intensity, the same geometry
    s2: torch.Tensor
    corrected: Callable[[torch.Tensor], torch.Tensor] = lambda p: (
        p
    )  # of u's pseudo-label, [U, K, *S] -> [U, K, *S]; of g with --correct


@dataclass
class Term:
    """One unlabeled loss of a method, not yet weighted."""

    image: torch.Tensor  # [U, C, *S] clean image: what g sees
    target: torch.Tensor  # [U, K, *S] probabilities of its pseudo-label, no gradient
    loss: Callable[
        [torch.Tensor], torch.Tensor
    ]  # pixel weights [U, *S] -> scalar, in which only their ratios matter
    weight: torch.Tensor | float = (
        1.0  # the method's own weight, [U] of a sample or [U, *S] of its pixels
    )
    mix: tuple | None = None  # (perm [U], share): the loss saw image and image[perm] blended,
    #                                                     share [U] or [U, *S] of the second
    belief: torch.Tensor | None = (
        None  # [U, K, *S] what g believes, with --correct, where it is not the target itself
    )


# ---------------------------------------------------------------------------------------------------- methods
# method(nets, teacher, batch, args, t) -> supervised loss, [Term, ...].  nets: the students; teacher: EMA of the first, in eval mode;
# t in [0, 1]: progress of training. To add a method: one function, and its name in METHODS; in STUDENTS if it needs two; in DEFAULTS if
# its options differ from the paper's. Labeled images, weak and strong views go through a student in passes of their own: mixed statistics of
# batch norm let pseudo-labels drift (results/baselines).


def supervised(nets, teacher, batch, args, t):
    """(cross-entropy + soft Dice) / 2 on the labeled images, summed over the students."""
    return sum(seg_loss(net(batch.x), batch.y) for net in nets), []


def pseudo_label(nets, teacher, batch, args, t):
    """Lee 2013 with an EMA teacher: its hard label teaches the student on the weak view, where it is confident (PL-T of the paper).

    Deviation from Lee, who uses the student's own label. PL-C and PL-QW of the paper keep every pixel: --conf-threshold 0.
    """
    target = batch.corrected(probabilities(teacher, batch.u))  # [U, K, *S]
    sure = confident(target, args)  # [U, *S]
    at_x, at_u = nets[0](batch.x), nets[0](batch.u)
    return seg_loss(at_x, batch.y), [
        Term(batch.u, target, lambda w: seg_loss(at_u, harden(target), w * sure))
    ]


def mean_teacher(nets, teacher, batch, args, t):
    """Tarvainen and Valpola 2017: squared difference of the student's probabilities on a strong view and the teacher's on the weak one.

    Deviation: the teacher is in eval mode, with averaged BN statistics and without dropout.
    """
    target = batch.corrected(probabilities(teacher, batch.u))
    at_x, at_s = nets[0](batch.x), nets[0](batch.s1)
    return seg_loss(at_x, batch.y), [Term(batch.u, target, lambda w: mse_loss(at_s, target, w))]


def ua_mt(nets, teacher, batch, args, t):
    """UA-MT, Yu et al. 2019: mean teacher where the teacher is certain, sum([h < H] |f(s1) - f'(u)|^2) / sum([h < H]) (their Eq. 3), h the
    entropy of the mean of 8 passes with dropout and noise (their Eq. 2).

    H grows from 3/4 to 1 of ln 2, the largest entropy of two classes, with the paper's Gaussian ramp; with more classes it stays
    ln 2, as in the public multi-class implementations. A network without dropout (those on a ResNet) leaves the noise alone.
    Deviations: the student sees a strong view, not noise, and the target comes from one clean pass in eval mode.
    """
    target = batch.corrected(probabilities(teacher, batch.u))
    limit = (0.75 + 0.25 * math.exp(-5 * (1 - t) ** 2)) * math.log(2)
    sure = (uncertainty(teacher, batch.u, args.mc_passes) < limit).float()  # [U, *S]
    at_x, at_s = nets[0](batch.x), nets[0](batch.s1)
    return seg_loss(at_x, batch.y), [
        Term(batch.u, target, lambda w: mse_loss(at_s, target, w * sure))
    ]


def ict(nets, teacher, batch, args, t):
    """ICT, Verma et al. 2019: |f(mix(u_i, u_j)) - mix(f'(u_i), f'(u_j))|^2 with mix(a, b) = (1 - share) a + share b, share ~ Beta(alpha, alpha).

    Deviations: each pair has its own share, not the whole batch one; the teacher is in eval mode.
    """
    target, perm = batch.corrected(probabilities(teacher, batch.u)), shuffled(batch.u)
    share = (
        torch.distributions.Beta(args.mix_alpha, args.mix_alpha)
        .sample((len(perm),))
        .to(batch.u.device)
    )  # [U] of the second
    blend = lambda v: torch.lerp(v, v[perm], to_samples(share, v))
    at_x, at_blend = nets[0](batch.x), nets[0](blend(batch.u))
    return seg_loss(at_x, batch.y), [
        Term(batch.u, target, lambda w: mse_loss(at_blend, blend(target), w), mix=(perm, share))
    ]


def cps(nets, teacher, batch, args, t):
    """CPS, Chen et al. 2021: two students of different initialization, L_s = l(p1, y) + l(p2, y), and each is taught by the other's hard
    label, L_cps = l(p1, y2) + l(p2, y1).

    Deviations: l is our seg_loss (the paper: cross-entropy), and L_cps is not applied to the labeled images too.
    """
    (x1, u1), (x2, u2) = ((net(batch.x), net(batch.u)) for net in nets)
    p1, p2 = (batch.corrected(u.detach().float().softmax(1)) for u in (u1, u2))
    return seg_loss(x1, batch.y) + seg_loss(x2, batch.y), [
        Term(batch.u, p2, lambda w: seg_loss(u1, harden(p2), w)),
        Term(batch.u, p1, lambda w: seg_loss(u2, harden(p1), w)),
    ]


def contrastive(nets, teacher, batch, args, t):
    """CL of the paper: pseudo-label, plus .1 times the contrast of confident pixels between pseudo-classes (models.losses.pixel_contrast).

    The paper gives weight, temperature, negatives and threshold. The rest is ours, near U2PL (Wang et al. 2022): keys are the teacher's
    features; all are those of the middle level of the encoder (a quarter of the side in the U-Net, an eighth on a ResNet, a sixteenth in
    Swin-UNet), without a projection head; every confident pixel is an anchor; negatives are confident pixels of other classes (U2PL: unreliable
    ones) of the batch. Pixels of no weight take no part.
    """
    with torch.no_grad():
        keys = teacher.encode(batch.u)
        target = batch.corrected(teacher.decode(keys).float().softmax(1))
    sure, middle = confident(target, args), len(keys) // 2
    features = nets[0].encode(batch.u)
    at_x, at_u = nets[0](batch.x), nets[0].decode(features)
    anchors = features[middle]  # [U, F, *s]
    small = F.interpolate(target, size=anchors.shape[2:], mode="area")  # [U, K, *s]
    clear = confident(small, args)  # [U, *s]

    def loss(w):
        near = F.interpolate(w[:, None], size=anchors.shape[2:], mode="area")[:, 0] * clear
        nce = pixel_contrast(
            anchors,
            keys[middle],
            small.argmax(1),
            near > 0,
            negatives=args.negatives,
            temperature=args.temperature,
        )
        return seg_loss(at_u, harden(target), w * sure) + args.contrast_weight * weighted_mean(
            nce, near
        )

    return seg_loss(at_x, batch.y), [Term(batch.u, target, loss)]


def fixmatch(nets, teacher, batch, args, t):
    """FixMatch, Sohn et al. 2020, [max p(u) >= threshold] l(p(s1), argmax p(u)) (their Eq. 4): the student's own hard label on the weak view
    teaches it on a strong one, for segmentation with CutMix, as the baseline of UniMatch.

    Deviations: every pixel teaches unless --conf-threshold says otherwise (the papers: .95), since thin structures shrink where unsure pixels
    are left out; the loss is ours, and relative to the confident pixels, not to all; lambda has a warm-up and a ramp.
    """
    target, (cut, mix) = batch.corrected(probabilities(nets[0], batch.u)), cutmix(batch.u)
    label, sure = cut(harden(target)), cut(confident(target, args))
    at_x, at_s = nets[0](batch.x), nets[0](channels_last(cut(batch.s1)))
    return seg_loss(at_x, batch.y), [
        Term(batch.u, target, lambda w: seg_loss(at_s, label, w * sure), mix=mix)
    ]


def unimatch(nets, teacher, batch, args, t):
    """UniMatch, Yang et al. 2023: L_u = lambda l(p_fp, p_w) + mu / 2 (l(p_s1, p_w) + l(p_s2, p_w)), lambda = mu = 1/2 (their final loss of
    unlabeled images): two strong views with CutMix, and the weak view with half of the encoder's feature channels dropped.

    Deviations: those of fixmatch; images are mixed within the batch. Its L = (L_x + L_u) / 2 is --lam 1 but for the factor.
    """
    features = nets[0].encode(batch.u)
    both = [torch.cat([f, torch.feature_dropout(f, 0.5, True)]) for f in features]
    at_u, at_dropped = nets[0].decode(both).split(len(batch.u))
    target = batch.corrected(at_u.detach().float().softmax(1))
    label, sure = harden(target), confident(target, args)
    (cut1, mix1), (cut2, mix2) = cutmix(batch.u), cutmix(batch.u)
    at_x, strong = nets[0](batch.x), torch.cat([cut1(batch.s1), cut2(batch.s2)])
    at_s1, at_s2 = nets[0](channels_last(strong)).split(len(batch.u))
    label1, label2, sure1, sure2 = cut1(label), cut2(label), cut1(sure), cut2(sure)
    return seg_loss(at_x, batch.y), [
        Term(batch.u, target, lambda w: seg_loss(at_s1, label1, w * sure1) / 4, mix=mix1),
        Term(batch.u, target, lambda w: seg_loss(at_s2, label2, w * sure2) / 4, mix=mix2),
        Term(batch.u, target, lambda w: seg_loss(at_dropped, label, w * sure) / 2),
    ]


def bcp(nets, teacher, batch, args, t):
    """BCP, Bai et al. 2023: X_in = M x + (1 - M) u and X_out = M u + (1 - M) x with M a box of 2/3 of each side, L = l on the labeled pixels
    against y + alpha l on the unlabeled ones against the teacher's hard label. Until lambda sets in, `copy_paste` trains on labeled images alone.

    alpha is --lam. As in the paper, half of the images take part in each direction. Deviations: both directions are pooled, not summed; a box
    for each pair; the second stage goes on from the first one's last weights, not its best.
    """
    belief = batch.corrected(probabilities(teacher, batch.u))
    target = keep_largest(belief) if args.largest_component else belief
    n = max(len(batch.x), len(batch.u))
    x, y, u, target, belief = (repeated(v, n) for v in (batch.x, batch.y, batch.u, target, belief))
    box = augment.random_box(x, args.paste)  # [n, 1, *S]
    inward = to_samples(torch.arange(n, device=x.device) % 2 == 0, x)
    labeled = torch.where(inward, box, 1 - box)  # 1 where the labeled image shows
    seen = 1 - labeled[:, 0]  # [n, *S] of u
    logits = nets[0](channels_last(torch.where(labeled > 0, x, u)))
    return seg_loss(logits, y, labeled[:, 0]), [
        Term(u, target, lambda w: seg_loss(logits, harden(target), w), weight=seen, belief=belief)
    ]


def copy_paste(nets, teacher, batch, args, t):
    """The warm-up stage of BCP: a box of a labeled image on another labeled image, and of its label on the other's."""
    box, perm = augment.random_box(batch.x, args.paste) > 0, shuffled(batch.x)
    x, y = (torch.where(box, v[perm], v) for v in (batch.x, batch.y))
    return seg_loss(nets[0](channels_last(x)), y), []


METHODS = {
    f.__name__: f
    for f in (
        supervised,
        pseudo_label,
        mean_teacher,
        ua_mt,
        ict,
        cps,
        contrastive,
        fixmatch,
        unimatch,
        bcp,
    )
}
STUDENTS = {"cps": 2}  # the others have one
WARM_UP = {"bcp": copy_paste}  # until lambda sets in; the others: supervised


PAPER = dict(lam=0.25, lam_warmup=0.075, lam_ramp=0.15, conf_threshold=0.9)
DEFAULTS = {  # where a method's own publication says otherwise, or something else did better (results/baselines)
    "mean_teacher": dict(lam=3.0),
    "ua_mt": dict(lam=3.0),
    "ict": dict(lam=3.0),
    "cps": dict(lam=1.0),
    "fixmatch": dict(lam=1.0, conf_threshold=0.0),
    "unimatch": dict(lam=1.0, conf_threshold=0.0),
    "bcp": dict(lam=0.5, lam_warmup=0.25, lam_ramp=0.0),
}


def defaults_of(name):
    """The default of an option, by method, as the help says it."""
    own = [f"{method} {d[name]:g}" for method, d in DEFAULTS.items() if name in d]
    return f"default: {', '.join([f'{PAPER[name]:g}', *own])}"


@torch.no_grad()
def probabilities(net, image):
    """Softmax of a network that gets no gradient here. [B, C, *S] -> [B, K, *S] float32"""
    return net(image).float().softmax(1)


def harden(p):
    """The one-hot label of the most probable class. [B, K, *S] -> [B, K, *S]"""
    return one_hot(p.argmax(1), p.shape[1])


def confident(p, args):
    """1 where the largest probability reaches --conf-threshold, else 0. [B, K, *S] -> [B, *S]"""
    return (p.amax(1) >= args.conf_threshold).float()


def uncertainty(net, image, passes):
    """Entropy, in nats, of the mean of `passes` predictions of a net in eval mode with its dropout on and noise added. -> [B, *S]"""
    dropouts = [m for m in net.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]
    for m in dropouts:
        m.train()
    p = (
        sum(
            probabilities(net, image + (0.1 * torch.randn_like(image)).clamp(-0.2, 0.2))
            for _ in range(passes)
        )
        / passes
    )
    for m in dropouts:
        m.eval()
    return -(p * p.clamp_min(1e-6).log()).sum(1)


def shuffled(x):
    """A random order of a batch, [B]."""
    return torch.randperm(len(x), device=x.device)


def repeated(x, count):
    """The first `count` of x, x, x, ... [B, ...] -> [count, ...]"""
    return x[torch.arange(count, device=x.device) % len(x)]


def cutmix(u):
    """CutMix (French et al. 2020), boxes like UniMatch's: with p = .5, one of 2 to 40% of the area shows another sample of the batch.

    -> (a function that cuts [U, *S] and [U, channels, *S] alike, the Term's mix)
    """
    perm, (U, dims) = shuffled(u), (len(u), u.dim() - 2)
    rand = torch.rand(U, 2 + dims, device=u.device)
    area = (0.02 + 0.38 * rand[:, :1]) * (rand[:, 1:2] < 0.5)  # [U, 1]
    stretch = math.log(1 / 0.3) * (
        rand[:, 2:] - rand[:, 2:].mean(1, keepdim=True)
    )  # sides differ by up to 1 / .3
    box = augment.random_box(u, area ** (1 / dims) * stretch.exp())  # [U, 1, *S]

    def cut(v):
        return torch.where((box if v.dim() == u.dim() else box[:, 0]) > 0, v[perm], v)

    return cut, (perm, box[:, 0])


def keep_largest(p):
    """Pseudo-labels with only the largest component of each class; elsewhere class and background swap probabilities. [B, K, *S] twice"""
    label = p.argmax(1)
    kept = torch.stack(
        [
            torch.from_numpy(metrics.largest_component(one, p.shape[1]) == one)
            for one in label.cpu().numpy()
        ]
    ).to(p.device)
    background = p.scatter(1, label[:, None], p[:, :1])
    background[:, 0] = p.amax(1)
    return torch.where(kept[:, None], p, background)


# ---------------------------------------------------------------------------------------------------- the two quality hooks


def scores(g, term, args):
    """Quality of a pseudo-label at --weight-level. -> q [U, 1] of the image, [U, K] of its classes, or [U, *S] of its pixels

    quality: g's answer for the hard label (Eq. 7); for the image the mean over the foreground classes, and so for the background's pixels;
    for a pixel the probability that its class is right. Of a corrected label, its expected Dice by the belief that made it, without asking g
    again (optimistic, as any judgment of oneself); of a pixel, the label's confidence. confidence: the largest probability of the pixel; its
    mean over all pixels (PL-C of the paper), and over those of each pseudo-class. An absent class counts with g's answer for its empty mask.
    """
    hard = harden(term.target)  # [U, K, *S]
    if args.weight == "quality":
        with torch.no_grad():
            belief = term.target if term.belief is None else term.belief
            if args.weight_level == "pixel":
                return (
                    (hard * belief).sum(1) if args.correct else 1 - g.error(term.image, hard[:, 1:])
                )
            q = (
                quality_target(hard[:, 1:], belief[:, 1:])
                if args.correct
                else g(term.image, hard[:, 1:])
            )  # [U, K-1]
        whole = q.mean(1, keepdim=True)
        return whole if args.weight_level == "image" else torch.cat([whole, q], 1)
    confidence = term.target.amax(1, keepdim=True)  # [U, 1, *S]
    if args.weight_level == "class":
        return (confidence * hard).flatten(2).sum(2) / hard.flatten(2).sum(2).clamp_min(1)
    return confidence[:, 0] if args.weight_level == "pixel" else confidence.flatten(2).mean(2)


def pixel_weights(g, term, args):
    """QW: the weight of each pixel of a clean image, w = q^2 [q >= .5] for its image, its pseudo-class or itself. -> [U, *S], no gradient"""
    shape = term.target[:, 0].shape
    if args.weight == "none":
        return torch.ones(shape, device=term.target.device)
    q = scores(g, term, args)
    w = torch.nan_to_num(q) ** args.weight_power * (
        q >= args.weight_threshold
    )  # NaN weighs nothing
    if args.weight_level == "image":
        return to_samples(w[:, 0], term.target[:, 0]).expand(shape)
    if args.weight_level == "class":
        return w.gather(1, term.target.argmax(1).flatten(1)).reshape(shape)
    return w


@torch.no_grad()
def corrected(g, image, p):
    """--correct: the probability of the truth for a dense g that has seen the pseudo-label. image [U, C, *S], p [U, K, *S] -> [U, K, *S]"""
    return g.belief(image, harden(p)[:, 1:])


def as_seen(w, term):
    """Weights [U, *S] blended like the images that the loss saw, times the method's own weight."""
    if term.mix is not None:
        perm, share = term.mix
        w = torch.lerp(w, w[perm], share if share.dim() > 1 else to_samples(share, w))
    return w * (
        to_samples(term.weight, w)
        if torch.is_tensor(term.weight) and term.weight.dim() == 1
        else term.weight
    )


def unlabeled_loss(g, terms, args, device):
    """sum(w l) / sum(w) over pixels, summed over the terms; 0 where nothing has weight. -> loss, [mean weight, effective share of the samples]

    The weights stand inside the sums of each loss (models/losses.py). The effective share is Kish's sample size, (sum w)^2 / sum w^2,
    over U: 1 where all weigh alike, 1/U where one alone counts.
    """
    total, seen, known = torch.zeros((), device=device), [], {}
    for term in terms:
        if id(term.target) not in known:  # UniMatch has three terms of one pseudo-label
            known[id(term.target)] = pixel_weights(g, term, args)
        pixels = as_seen(known[id(term.target)], term)  # [U, *S]
        w = pixels.flatten(1).mean(1)  # [U]
        total = total + term.loss(pixels)
        seen.append(
            torch.stack([w.mean(), w.sum() ** 2 / (len(w) * (w**2).sum()).clamp_min(1e-12)])
        )
    return total, torch.stack(seen).mean(0) if seen else torch.zeros(2, device=device)


def foreground_share(labels, device):
    """Mean share of the pixels that a foreground class takes in labels [B, K, *S], one-hot or probabilities that are hardened. -> scalar"""
    shares = [(label.argmax(1) > 0).float().mean() / (label.shape[1] - 1) for label in labels]
    return torch.stack(shares).mean() if shares else torch.zeros((), device=device)


def quality_loss(g, nets, image):
    """QAR: mean of 1 - g(u, softmax f(u)) over images and classes, summed over students; the gradient flows through g into each."""
    return sum((1 - g(image, net(image).float().softmax(1)[:, 1:])).mean() for net in nets)


# ---------------------------------------------------------------------------------------------------- one training step


@dataclass
class Run:
    """What a step changes or asks, and where it runs."""

    nets: list  # the students f
    teacher: torch.nn.Module  # EMA of the first student
    g: torch.nn.Module | None  # frozen quality predictor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    on: Compute


def ramp(t, warmup, length):
    """0 until warmup, then linearly to 1 over length; all are shares of training."""
    return min(1.0, max(0.0, (t - warmup) / length if length else float(t >= warmup)))


def lambdas(args, t):
    """Weights of the unlabeled loss and of QAR at progress t. While the first is 0, a step is a supervised one: the unlabeled images would
    only slow it, and in a batch with the labeled ones shift the statistics of batch norm."""
    return args.lam * ramp(t, args.lam_warmup, args.lam_ramp), args.qar * ramp(
        t, args.qar_warmup, args.qar_ramp
    )


def needs_unlabeled(args, step):
    """Whether anybody will look at a step's unlabeled images."""
    lam, lam_qar = lambdas(args, (step - 1) / args.steps)
    return bool(lam_qar or (lam and args.method != "supervised"))


def onset(args):
    """The number of supervised steps before unlabeled images come in; 0 if they never do."""
    count = bisect.bisect_left(
        range(1, args.steps + 1), True, key=lambda step: needs_unlabeled(args, step)
    )
    return count % args.steps


def total_loss(nets, teacher, g, batch, args, t):
    """The loss of one step, and its parts for the log: [supervised, unlabeled, QAR, mean weight, effective share, foreground of the
    pseudo-labels, of the labels]."""
    lam, lam_qar = lambdas(args, t)
    method = METHODS[args.method] if lam else WARM_UP.get(args.method, supervised)
    if args.correct:
        batch = replace(batch, corrected=lambda p: corrected(g, batch.u, p))
    sup, terms = method(nets, teacher, batch, args, t)
    unsup, weights = unlabeled_loss(g, terms, args, sup.device)
    shares = (
        foreground_share([term.target for term in terms], sup.device),
        foreground_share([batch.y], sup.device),
    )
    few = batch.u[
        : max(2, math.ceil(args.qar_share * len(batch.u)))
    ]  # of each process; at least two, for batch norm
    qar = quality_loss(g, nets, few) if lam_qar else torch.zeros((), device=sup.device)
    loss = sup + lam * unsup + lam_qar * qar
    return loss, torch.stack([sup, unsup, qar, *weights, *shares]).detach()


def train_step(run, batch, args, step):
    """One optimizer step on a batch. -> the loss and its parts [8], not read back from the device"""
    with run.on.autocast():
        loss, parts = total_loss(run.nets, run.teacher, run.g, batch, args, (step - 1) / args.steps)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    distributed.average_gradients(p for net in run.nets for p in net.parameters())
    run.scaler.unscale_(run.optimizer)
    for net in run.nets:
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    update_average(run.teacher, run.nets[0], max(0, step - onset(args)), args.ema)
    return torch.cat([loss.detach()[None], parts])


# ---------------------------------------------------------------------------------------------------- batches


class Feed(torch.utils.data.Dataset):
    """Item n are the images of step n, as they are stored: labeled, and unlabeled ones or None. The same whoever reads them, and whether before or
    after other steps; of several processes, each takes its share."""

    def __init__(self, labeled, unlabeled, args):
        self.labeled, self.unlabeled, self.args, self.rank, self.world = (
            labeled,
            unlabeled,
            args,
            distributed.rank(),
            distributed.world(),
        )

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(seed_of(self.args.seed, step, 0))

        def some(images, count):  # without repetition while there are enough
            order = torch.cat(
                [
                    torch.randperm(len(images), generator=generator)
                    for _ in range(-(-count // len(images)))
                ]
            )
            mine, place = (
                slice(self.rank, count, self.world),
                torch.rand(count, 3, generator=generator),
            )
            return images.fetch(order[mine], place[mine])

        try:
            return some(self.labeled, self.args.batch), some(
                self.unlabeled, self.args.batch_unlabeled
            ) if needs_unlabeled(self.args, step) else None
        except InputError as error:  # raised in a worker, it would come with the worker's traceback
            return error


def views(fetched, K, args, device):
    """The batch of a step from what the feed has read: standardized and augmented on the device."""
    if isinstance(fetched, InputError):
        raise fetched
    labeled, unlabeled = fetched
    x, y = augment.weak(*loading.standardized(labeled, device), args.flip)
    x = channels_last(augment.strong(x, args.strength))
    if unlabeled is None:
        return Batch(x, one_hot(y, K), u=x[:0], s1=x[:0], s2=x[:0])
    u, _ = loading.standardized(unlabeled, device)
    u = channels_last(augment.weak(u, flip=args.flip))
    return Batch(x, one_hot(y, K), u, *(channels_last(augment.strong(u)) for _ in range(2)))


def load_data(info, args, on):
    """Labeled and unlabeled slices or volumes, kept as --cache says. Labels of unlabeled cases are never read."""
    labeled, others = h5.choose_labeled(info, args.labeled, args.labeled_seed)
    h5.check_foreground(info, labeled)
    parts = [(info, "train", others)] if others else []
    parts += [(info, "unlabeled", None)] if info.splits.get("unlabeled") else []
    if args.unlabeled:
        other = h5.read_info(args.unlabeled)
        for key in ("channels", "dims"):
            if getattr(other, key) != getattr(info, key):
                raise InputError(
                    f"{args.unlabeled}: has {key} {getattr(other, key)}, but {info.path} has {getattr(info, key)}"
                )
        h5.check_prepared({other.path: other.describe()}, {info.path: info.describe()})
        parts += [
            (other, split, None) for split in ("train", "unlabeled") if other.splits.get(split)
        ]
    if args.cache == "auto":
        everything = [(info, "train", labeled), (info, "val", None), *parts]
        args.cache = where_it_fits(
            sum(
                loading.bytes_in_memory(i, split, args.size, names)
                for i, split, names in everything
            ),
            on.device,
        )
    load = (
        loading.Stored
        if args.cache == "off"
        else loading.load_slices
        if info.dims == 2
        else loading.load_volumes
    )
    train = load(info, "train", args.size, labeled)
    if not parts and args.method != "supervised":
        print("no unlabeled image: the labeled ones serve as unlabeled ones, without their labels")
    unlabeled = (
        functools.reduce(
            operator.add,
            [load(i, split, args.size, names, labels=False) for i, split, names in parts],
        )
        if parts
        else train
    )
    return (
        (train.to(on.device), unlabeled.to(on.device))
        if args.cache == "device"
        else (train, unlabeled)
    )


def where_it_fits(size, device):
    """--cache auto for `size` bytes: the GPU if they take less than a quarter of its free memory, which training needs too; memory if they
    take less than half of this process's share, since loading takes twice as much; else off."""
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
        return "device"
    return (
        "ram" if size < h5.free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / 2 else "off"
    )


# ---------------------------------------------------------------------------------------------------- main


def set_defaults(args, info):
    """Fills in what depends on the data: published settings for slices (the paper's) and for volumes (the left-atrium baselines').
    -> what models.build() takes for f"""
    args.size, args.flip = loading.network_grid(info, args.size), h5.check_flip(info, args.flip)
    for name, value in (
        dict(model="unet", batch=32, batch_unlabeled=64)
        if info.dims == 2
        else dict(model="vnet", batch=2, batch_unlabeled=2)
    ).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("batch", "batch_unlabeled"):
        if getattr(args, name) % distributed.world():
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: cannot be shared evenly by {distributed.world()} processes"
            )
    options = {
        name: value
        for name, value in dict(
            width=args.width, dropout=args.dropout, encoder=args.encoder
        ).items()
        if value is not None
    }
    for name in options:
        if name not in models.options(args.model):
            raise InputError(
                f"--{name} is an option of --model {', '.join(n for n in models.segmentation_networks() if name in models.options(n))}"
            )
    network = dict(
        name=args.model,
        channels=info.channels,
        classes=len(info.classes),
        dims=info.dims,
        **options,
    )
    try:
        models.check(
            network,
            loading.shape_of(args.size),
            args.batch if args.method == "supervised" else min(args.batch, args.batch_unlabeled),
        )
    except Exception as error:  # a network's own words
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        raise InputError(f"--model {args.model}: {' '.join(text.split())[:300]}") from None
    return network


NOTHING = 0.01  # val Dice up to which nothing has been learned
PARTS = ["loss", "sup", "unsup", "qar", "weight", "ess", "share", "share_y"]
OF_TERMS = ["weight", "ess", "share"]  # known where there is an unlabeled loss


def averaged(table, step, args):
    """Means of PARTS over the steps up to `step`, those of the unlabeled loss over the steps alone that had one. [steps, parts] -> {name: mean}"""
    weighed = [
        args.method != "supervised" and lambdas(args, (s - 1) / args.steps)[0] > 0
        for s in range(step - len(table) + 1, step + 1)
    ]
    means = dict(zip(PARTS, table.mean(0).tolist()))
    if not any(weighed):
        return {name: value for name, value in means.items() if name not in OF_TERMS}
    return means | {name: table[weighed, PARTS.index(name)].mean().item() for name in OF_TERMS}


def advice(parts):
    """What to try when a loss is not finite, from the values of PARTS in that step."""
    if all(map(math.isfinite, (parts.get("sup", math.inf), parts.get("unsup", math.inf)))):
        return "the labeled and unlabeled losses are: g's answers for f's outputs are not; try --amp off, or train g again"
    return "try a lower --lr, --amp off, or a lower --lam"


def alarm(parts, dice, best, args):
    """A line for the log where pseudo-labels collapse, else "". parts: means since the last validation; dice, best: of val, now and so far

    Pseudo-labels collapse where their share of foreground is under a third, or over three times, that of the labels, or where val lost a third of its best
    Dice. The share is a mean over classes, so that one vanished class of several may go unseen.
    """
    share, truth = parts.get("share"), parts["share_y"]
    if share is not None and truth > 0 and not truth / 3 <= share <= 3 * truth:
        sign = f"foreground classes take {100 * share:.2g}% of the pseudo-labels' pixels each, {100 * truth:.2g}% of the labels'"
    elif dice < best * 2 / 3:
        sign = f"val Dice fell from {best:.3f} to {dice:.3f}"
    else:
        return ""
    remedies = ["a lower --qar"] if args.qar else []
    if args.method != "supervised":
        remedies += ["a lower --lam", "a later --lam-warmup"]
        remedies += (
            []
            if args.correct or args.weight == "quality"
            else ["guidance (--weight quality, --correct)"]
        )
    return f"warning: {sign}; try {', '.join(remedies or ['a lower --lr'])}"


def look(net, g, samples, on, held):
    """f's outputs for a few val images, as pictures, and what g says of them: the mean of its answers over images and classes, that of the truth, and
    the mean error. Where the first rises and the second does not, f fools g. held: h5.held_classes() of val -> what Log.write() takes"""
    net, rows = fused(net), torch.arange(len(samples))
    with torch.no_grad():
        mask = torch.cat(
            [
                inference.class_probabilities(net, samples.batch(part, on.device)[0], on)
                .argmax(1)
                .cpu()
                for part in rows.split(8)
            ]
        )  # [N, *S]
    shown = []
    for image, truth, found in zip(samples.image[:4].numpy(), samples.label.numpy(), mask.numpy()):
        volume = truth.ndim == 3
        z = figures.middle(truth, len(truth)) if volume else ...
        shown.append(
            figures.overlay(
                image[0, z] if volume else image.transpose(1, 2, 0).squeeze(), (truth[z], found[z])
            )
        )
    pictures = [("val: image, truth, output", np.concatenate(shown))]
    if g is None:
        return dict(pictures=pictures)
    predicted, true, _ = inference.estimate_quality(g, samples, rows, mask, on)
    pictures.append(("val: predicted (across) and true (up) Dice", figures.dots(predicted, true)))
    predicted, true = predicted[:, held], true[:, held]
    return dict(
        pictures=pictures,
        g_true=float(true.mean()),
        g_predicted=float(predicted.mean()),
        g_mae=float(np.abs(predicted - true).mean()),
    )


def main(argv=None):
    args = parse_args(argv)
    on, info = compute(args.device, args.amp, args.deterministic), h5.read_info(args.data)
    distributed.start(on.device)
    network = set_defaults(args, info)
    K, cut = len(info.classes), inference.window_of(args.size, args)
    held = claim(args.out) if distributed.rank() == 0 and os.path.isdir(args.out) else None  # noqa: F841  (until main ends)
    g, seen = None, []
    if args.qp:
        g, seen = checkpoints.load_quality(args.qp, info, on, args.size, {args.out: vars(args)})
    asks = (
        "--correct"
        if args.correct
        else "--weight-level pixel"
        if args.weight == "quality" and args.weight_level == "pixel"
        else None
    )
    if asks and not hasattr(g, "belief"):
        raise InputError(
            f"{args.qp}: has a scalar head, which knows nothing of pixels; {asks} needs train_qp.py --head dense"
        )
    args.weight_level = args.weight_level or (
        "pixel" if hasattr(g, "belief") and not args.correct else "image"
    )
    resumed, inputs = start_run(
        "ssl",
        args,
        info.describe(),
        inputs=("qp", "unlabeled"),
        free=("keep", "window", "stride", "blend", "cache", "workers"),
    )
    if resumed and resumed["finished"]:
        print(
            f"{args.out}: this run is finished (step {resumed['step']}, best val Dice {resumed['best']['dice']:.4f} at step {resumed['best']['step']}); "
            "--overwrite trains it again"
        )
        return
    if missing := [e.name for e in info.entries("val") if not e.labeled]:
        raise InputError(f"{args.data}: /val/{missing[0]} has no label, so it cannot validate")
    held = h5.held_classes(info, "val")  # every process looks at all cases
    if absent := list(itertools.compress(info.classes[1:], ~held)):
        print(f"note: {h5.without(absent, 'val')}: left out of the Dice that selects best.pt")
    labeled, unlabeled = load_data(info, args, on)
    mine = [e.name for e in info.entries("val")][distributed.rank() :: distributed.world()]
    val = inference.Cases(info, "val", args.size, mine, keep=args.cache != "off")
    for _ in val:  # read now: a damaged case should not end the run at its first validation
        pass
    watched = loading.showcase(info, "val", args.size) if distributed.rank() == 0 else None
    if more := set(seen) - set(labeled.case):
        print(
            f"note: g has learned from the labels of {len(more)} train cases that are unlabeled here, among them {min(more)}"
        )

    torch.manual_seed(args.seed)
    nets = [models.build(**network) for _ in range(STUDENTS.get(args.method, 1))]
    if args.encoder_weights and not resumed:
        for net in nets:
            said = checkpoints.load_encoder(net, args.encoder_weights)
        print(said)
    nets = [distributed.synced(on.place(net)).train() for net in nets]
    teacher = copy.deepcopy(nets[0]).eval().requires_grad_(False)
    if args.compile:
        nets, teacher = [compiled(net) for net in nets], compiled(teacher)
    parameters = [p for net in nets for p in net.parameters()]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            parameters, args.lr, weight_decay=args.weight_decay, fused=True
        )
        factor = lambda step: 0.5 * (1 + math.cos(math.pi * step / args.steps))
    else:
        optimizer = torch.optim.SGD(
            parameters, args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True
        )
        factor = lambda step: (1 - step / args.steps) ** 0.9
    run = Run(nets, teacher, g, optimizer, on.scaler(), on)
    first, best, peak, parts, seconds = (
        0,
        dict(dice=-1.0, step=0),
        -1.0,
        [],
        0.0,
    )  # parts: those of each step since the last validation
    if resumed:
        for net, weights in zip([*nets, teacher], [*resumed["nets"], resumed["teacher"]]):
            net.load_state_dict(weights)
        optimizer.load_state_dict(resumed["optimizer"])
        run.scaler.load_state_dict(resumed["scaler"])
        first, best, peak = resumed["step"], resumed["best"], resumed.get("peak", -1.0)
        parts, seconds = [*resumed["parts"].to(on.device)], resumed["seconds"]

    def means(step):
        """Of the parts of each step since the last validation, over processes. -> [steps, parts]; refuses to go on where one is not finite"""
        table = distributed.mean(torch.stack(parts))
        check_finite(table, PARTS, nets, step, advice)
        return table

    def save(name, step, parts=torch.zeros(0, len(PARTS)), finished=False):
        if distributed.rank() == 0:
            save_checkpoint(
                os.path.join(args.out, name),
                "ssl",
                model=nets[0].config,
                nets=[net.state_dict() for net in nets],
                teacher=teacher.state_dict(),
                args=vars(args),
                step=step,
                best=best,
                peak=peak,
                optimizer=optimizer.state_dict(),
                finished=finished,
                scaler=run.scaler.state_dict(),
                data=info.describe(),
                inputs=inputs,
                labeled=sorted({*labeled.case, *seen}),
                parts=parts.cpu(),
                seconds=time.perf_counter() - start,
            )

    distributed.wait()  # until all have looked at what is in OUT
    columns = [
        "step",
        *PARTS,
        "lam",
        "lr",
        "val_dice",
        *(f"val_{c}" for c in info.classes[1:]),
        "g_true",
        "g_predicted",
        "g_mae",
        "ms",
        "note",
    ]
    log = Log(
        args.out,
        columns,
        first,
        writes=distributed.rank() == 0,
        fresh=not resumed,
        shown=["step", *PARTS[:-2], "lam", "val_dice"],
    )
    print(
        f"{args.method}: {models.parameters(nets[0]) / 1e6:.1f} M parameters, {len(labeled)} labeled and {len(unlabeled)} unlabeled "
        f"{'slices' if info.dims == 2 else 'volumes'} ({dict(device='on the device', ram='in memory', off='read from disk')[args.cache]}), {on}"
        + (f", {distributed.world()} processes" if distributed.world() > 1 else "")
        + (f", from step {first}" if first else "")
    )
    steps = range(first + 1, args.steps + 1)
    feed = torch.utils.data.DataLoader(
        Feed(labeled, unlabeled, args),
        batch_size=None,
        sampler=steps,
        worker_init_fn=workers.start_reader,
        num_workers=args.workers if args.cache == "off" else 0,
        pin_memory=args.cache != "device" and on.device.type == "cuda",
    )
    bar = tqdm(
        zip(steps, feed),
        initial=first,
        total=args.steps,
        desc=args.method,
        unit=" steps",
        disable=not sys.stderr.isatty() or distributed.rank() > 0,
    )
    start = time.perf_counter() - seconds
    with postponed_signals() as stop:
        for step, fetched in bar:
            torch.manual_seed(seed_of(args.seed, step, 1 + distributed.rank()))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor(step - 1)
            parts.append(train_step(run, views(fetched, K, args, on.device), args, step))

            if step in args.keep:
                save(f"step{step}.pt", step, means(step))
            if step % args.eval_every == 0 or step == args.steps:
                averages, milliseconds = (
                    averaged(means(step), step, args),
                    (time.perf_counter() - start) / len(parts) * 1000,
                )
                dice, per_class = inference.mean_dice(
                    distributed.gather(inference.dice_table(nets[0], val, on, K, cut)), held
                )
                note, peak = alarm(averages, dice, peak, args), max(dice, peak)
                if best["step"] <= onset(args) < step:  # the supervised part does not count
                    best = dict(dice=-1.0, step=step)
                if dice > best["dice"]:
                    best = dict(dice=dice, step=step)
                    save("best.pt", step)
                log.write(
                    step,
                    note=note,
                    **averages,
                    lam=lambdas(args, (step - 1) / args.steps)[0],
                    lr=optimizer.param_groups[0]["lr"],
                    val_dice=dice,
                    **{f"val_{c}": d for c, d in zip(info.classes[1:], per_class) if d is not None},
                    ms=milliseconds,
                    **(look(nets[0], g, watched, on, held) if watched else {}),
                )
                finished = (
                    step == args.steps
                    or step - max(best["step"], onset(args)) >= args.patience * args.eval_every
                )
                parts, start = [], time.perf_counter()
                save("last.pt", step, finished=finished)
                if finished:
                    break
            if code := distributed.largest(stop()):
                if parts:
                    save("last.pt", step, means(step))
                print(
                    f"stopped after step {step}; {args.out}/last.pt holds it: go on with --resume"
                )
                distributed.wait()  # until it is written: torchrun ends all when one has left
                sys.exit(code)
    distributed.wait()  # until everything is written
    print(
        f"best val Dice {best['dice']:.4f} at step {best['step']}\n"
        f"wrote {args.out}/best.pt, last.pt, log.csv"
    )
    if not max(peak, best["dice"]) > NOTHING:
        print(
            f"warning: val Dice was never above {NOTHING}, so f has learned nothing; look at the "
            f"labels (python -m data.h5 {shlex.quote(args.data)} --preview FILE.png), the "
            "classes' shares of pixels, --lr and --steps"
        )
    print(
        "next: "
        + shlex.join(
            [
                "python",
                "evaluate.py",
                args.data,
                f"{args.out}/best.pt",
                "--out",
                f"{args.out}/table",
                *(["--window", "whole"] if args.window == "whole" else []),
                *(["--stride", ",".join(map(str, args.stride))] if args.stride else []),
                *(["--blend", args.blend] if args.blend != "gaussian" else []),
            ]
        )
    )


if __name__ == "__main__":
    cli(main)
