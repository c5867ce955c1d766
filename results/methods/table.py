"""The tables of results/methods.md, from the logs of methods.sh.

    python results/methods_table.py SEED runs/m/cvc runs/m/acdc

One row per method: mean foreground Dice on val (%), without and with QW, at the best of the validations and at the last step, and the cost of a
step once the unlabeled loss has set in, relative to the supervised step of the same data set.
"""
import csv
import os
import sys

ROWS = ("sup", "pl", "pl_t", "pl_c", "mt", "ua_mt", "ict", "cps", "cl", "fixmatch", "unimatch", "bcp")


def read(path):
    """Best and last Dice of a run and the milliseconds of its step; None where it is not there or was not finished."""
    rows = list(csv.DictReader(open(path))) if os.path.exists(path) else []
    if not rows or rows[-1]["step"] != "600":
        return None
    dice = [100 * float(r["val_dice"]) for r in rows]
    return max(dice), dice[-1], min(float(r["ms"]) for r in rows[-3:])


seed = sys.argv[1]
for data in sys.argv[2:]:
    runs = {name: read(f"{data}/{name}_{seed}/log.csv") for row in ROWS for name in (row, f"{row}_qw", f"{row}_qar")}
    print(f"\n{data}\n\n| method | best | with QW | last | with QW | cost of a step | with QW |\n|---|---|---|---|---|---|---|")
    for name, plain, guided in [*((row, runs[row], runs[f"{row}_qw"]) for row in ROWS), ("sup + QAR", runs["sup_qar"], None)]:
        if plain or guided:
            cells = [f"{r[i]:.1f}" if r else "-" for i in (0, 1) for r in (plain, guided)]
            cost = [f"{r[2] / runs['sup'][2]:.1f}" if r else "-" for r in (plain, guided)]
            print("| " + " | ".join([name, *cells, *cost]) + " |")
