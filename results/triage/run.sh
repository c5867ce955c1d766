#!/usr/bin/env bash
# The runs and estimates behind README.md, but for those of the ensemble and of the former g. One
# data set at a time, from the project's top folder:
#     bash results/triage/run.sh ph2 14 1e-3      also: acdc 7 3e-3, cvc 4 1e-3
# f and g are those of ../evidence (protocol.md says how runs/ph2.h5, ... are made).
set -eu
PY=${PY:-.venv/bin/python}
data=$1 labeled=$2 lr=$3 runs=runs/evidence/small/$1 second=runs/triage/$1_second
$PY -m results.evidence.run --data $data --methods supervised ua_mt cps --rows none
$PY -c "from results.evidence import run; run.train_quality('small', '$data')"
$PY train_ssl.py runs/$data.h5 --out $second --labeled $labeled --seed 3 --size 64 --width 8 \
  --batch 8 --steps 1000 --eval-every 100 --lr $lr --patience 100 --resume
for split in test held_out; do
  $PY evaluate.py runs/$data.h5 $runs/supervised-none-[012]/last.pt $runs/ua_mt-none-[012]/last.pt \
    $runs/cps-none-[012]/last.pt --qp $runs/g/qp.pt --second $second/best.pt --split $split \
    --pictures 0 --out runs/triage/${data}_$split/table_dense
done
