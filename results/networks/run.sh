#!/usr/bin/env bash
# The experiments behind README.md, from the project's top folder:
#     bash results/networks/run.sh g                   the quality predictor (first)
#     bash results/networks/run.sh NETWORK sup|mt_qw   one run, as in `resnet_unet mt_qw`
#     bash results/networks/run.sh table               the table of all runs that are there
# PY names the Python. This makes runs/ph2.h5:
#     python -m data.images --preset ph2 PH2 --out runs/ph2.h5 --size 224
set -eu
PY=${PY:-.venv/bin/python}
network=$1 row=${2:-} out=runs/networks
case $network in
  g)  $PY corrupt.py runs/ph2.h5 --out $out/vqm --labeled 14 --size 64 --masks 100 --val-masks 5
      $PY train_qp.py runs/ph2.h5 --vqm $out/vqm/vqm.h5 --out $out/qp --members 1 --batch 16 \
        --per-image 40 --epochs 12
      exit ;;
  table)  $PY evaluate.py runs/ph2.h5 $out/*/*/best.pt --out $out/table --pictures 0
      exit ;;
esac
case $row in
  sup)    flags="--method supervised" ;;
  mt_qw)  flags="--method mean_teacher --weight quality --weight-level class --qp $out/qp/qp.pt" ;;
  *)      echo "no row $row: sup or mt_qw"; exit 2 ;;
esac
$PY train_ssl.py runs/ph2.h5 --out "$out/$network/$row" --model "$network" --labeled 14 $flags \
  --size 64 --steps 300 --batch 8 --batch-unlabeled 8 --lr 3e-4 --ema 0.99 \
  --lam-warmup 0.4 --lam-ramp 0.2 --eval-every 100 --resume
