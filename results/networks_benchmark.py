"""Size, work and speed of every network f at 224 x 224, RGB, 2 classes, in float32, as a Markdown table: python results/networks_benchmark.py

Rounds go through all networks in turn, so that whatever else the machine does meets them all; the best round of each counts.
"""
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate  # noqa: E402
import models  # noqa: E402
from models.device import channels_last  # noqa: E402

NETWORKS = {name: {} for name in models.segmentation_networks() if name != "smp:*"} | {
    f"{name} --encoder resnet50": dict(encoder="resnet50") for name in ("resnet_unet", "unetpp", "attention_unet")}
ROUNDS, SIDE = 4, 224


def built(title):
    return models.build(title.split()[0], channels=3, classes=2, **NETWORKS[title]).to(memory_format=torch.channels_last)


def multiply_adds(net):
    """Of one image, in 1e9: what papers call GFLOPs."""
    with torch.device("meta"):
        return evaluate.gigaflops(net.to("meta").eval(), torch.zeros(1, 3, SIDE, SIDE)) / 2


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main():
    torch.manual_seed(0)
    few, many = (channels_last(torch.randn(n, 3, SIDE, SIDE)) for n in (4, 8))
    rows = {title: dict(network=title, **{"M parameters": f"{models.parameters(built(title)) / 1e6:.1f}", "GFLOPs": f"{multiply_adds(built(title)):.1f}"})
            for title in NETWORKS}
    best = {title: [float("inf")] * 2 for title in NETWORKS}
    for _ in range(ROUNDS):
        for title in NETWORKS:
            net = built(title).eval()
            with torch.no_grad():
                predicts = seconds(lambda: net(many))
            net.train()
            trains = seconds(lambda: net(few).square().mean().backward())
            best[title] = [min(a, b) for a, b in zip(best[title], (predicts, trains))]
    for title, (predicts, trains) in best.items():
        rows[title] |= {"predicts, images/s": f"{8 / predicts:.1f}", "trains, images/s": f"{4 / trains:.1f}"}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores\n\n" + evaluate.markdown(list(rows.values())))


if __name__ == "__main__":
    main()
