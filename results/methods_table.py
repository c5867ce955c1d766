"""The tables of results/methods.md, from the logs of methods.sh.

    python results/methods_table.py runs/m/cvc runs/m/acdc

One row per method: mean foreground Dice on val (%), without and with QW, at the best of the validations and at the last step, and the cost of a
step once the unlabeled loss has set in, relative to the supervised step of the same data set. Mean over the seeds that are there.
"""
import csv
import sys
from glob import glob

ROWS = ("sup", "pl", "pl_t", "pl_c", "mt", "ua_mt", "ict", "cps", "cl", "fixmatch", "unimatch", "bcp")


def read(folder):
    """Of all seeds of a run -> number of seeds, best, last, milliseconds of a step; None where no run was finished."""
    logs = [list(csv.DictReader(open(path))) for path in sorted(glob(f"{folder}_[0-9]/log.csv"))]
    logs = [rows for rows in logs if rows and rows[-1]["step"] == "600"]
    if not logs:
        return None
    mean = lambda values: sum(values) / len(logs)
    return (len(logs), mean([100 * max(float(r["val_dice"]) for r in rows) for rows in logs]), mean([100 * float(rows[-1]["val_dice"]) for rows in logs]),
            mean([min(float(r["ms"]) for r in rows[-3:]) for rows in logs]))


for data in sys.argv[1:]:
    supervised = read(f"{data}/sup")
    print(f"\n{data}\n\n| method | best | with QW | last | with QW | cost of a step | with QW | seeds |\n|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        plain, guided = read(f"{data}/{row}"), read(f"{data}/{row}_qw")
        if plain or guided:
            cells = [f"{r[i]:.1f}" if r else "-" for i in (1, 2) for r in (plain, guided)]
            cost = [f"{r[3] / supervised[3]:.1f}" if r else "-" for r in (plain, guided)]
            print("| " + " | ".join([row, *cells, *cost, "/".join(str(r[0]) for r in (plain, guided) if r)]) + " |")
    if qar := read(f"{data}/sup_qar"):
        print(f"| sup + QAR | {qar[1]:.1f} | - | {qar[2]:.1f} | - | {qar[3] / supervised[3]:.1f} | - | {qar[0]} |")
