"""Size, work and speed of every network f at 224 x 224, RGB, 2 classes, in float32, as a Markdown
table.

    python -m results.networks.benchmark

Rounds go through all networks in turn, so that whatever else the machine does meets them all. The
best round of each counts.
"""

import os
import time

import torch

import evaluate
import models
from data import tables
from data.options import Parser, cli
from models.device import channels_last

DEEPER = dict(encoder="resnet50")
NETWORKS = {name: {} for name in models.segmentation_networks() if name != "smp:*"}
for name in ("resnet_unet", "unetpp", "attention_unet"):
    NETWORKS[f"{name} --encoder resnet50"] = DEEPER
ROUNDS = 4
SIDE = 224


def built(title):
    name = title.split()[0]
    net = models.build(name, channels=3, classes=2, **NETWORKS[title])
    return net.to(memory_format=torch.channels_last)


def images(count):
    return channels_last(torch.randn(count, 3, SIDE, SIDE))


def multiply_adds(net):
    """Of one image, in 1e9: what papers call GFLOPs."""
    with torch.device("meta"):
        image = torch.zeros(1, 3, SIDE, SIDE)
        return evaluate.gigaflops(net.to("meta").eval(), image) / 2


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speeds():
    """-> {title: (images predicted in a second, images trained on in a second)}"""
    few = images(4)
    many = images(8)
    predicts = dict.fromkeys(NETWORKS, float("inf"))
    trains = dict.fromkeys(NETWORKS, float("inf"))
    for _ in range(ROUNDS):
        for title in NETWORKS:
            net = built(title).eval()
            with torch.no_grad():
                predicts[title] = min(predicts[title], seconds(lambda: net(many)))
            net.train()
            step = lambda: net(few).square().mean().backward()
            trains[title] = min(trains[title], seconds(step))
    return {title: (8 / predicts[title], 4 / trains[title]) for title in NETWORKS}


def main():
    Parser(__doc__, prog="python -m results.networks.benchmark").parse_args()
    torch.manual_seed(0)
    rows = []
    for title, (predicts, trains) in speeds().items():
        rows.append(
            {
                "network": title,
                "M parameters": f"{models.parameters(built(title)) / 1e6:.1f}",
                "GFLOPs": f"{multiply_adds(built(title)):.1f}",
                "predicts, images/s": f"{predicts:.1f}",
                "trains, images/s": f"{trains:.1f}",
            }
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    print("\n" + tables.markdown(rows))


if __name__ == "__main__":
    cli(main)
