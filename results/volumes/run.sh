#!/usr/bin/env bash
# The experiments behind README.md, on the left-atrium volumes at half resolution, from the
# project's top folder:
#     python -m data.ssl4mis LA --out runs/la2.h5 --shrink 2
#     bash results/volumes/run.sh g 4|8           g for 4 or 8 labeled volumes (first)
#     bash results/volumes/run.sh ROW 4|8 SEED    a run of sup, mt, mt_qw, ua_mt, ua_mt_qw or qar
#     bash results/volumes/run.sh table 4|8       the tables of all runs that are there
# PY names the Python.
set -eu
PY=${PY:-.venv/bin/python}
row=${1:?which row? see the head of this file} labeled=${2:?4 or 8 labeled volumes?} seed=${3:-0}
data=runs/la2.h5 out=runs/v/$labeled
mkdir -p "$out"
case $row in
  g)      $PY corrupt.py $data --out "$out/vqm" --labeled "$labeled" --size 32,48,48 \
            --patches 4 --masks 60 --val-masks 5 --harvest-epochs 1,3,5,10,15
          $PY train_qp.py $data --vqm "$out/vqm/vqm.h5" --out "$out/qp" --size 16,24,24 \
            --width 16 --members 1 --batch 16 --per-image 40 --epochs 6 --overwrite
          exit ;;
  table)  $PY evaluate.py $data "$out"/*_[0-9]/best.pt --qp "$out/qp/qp.pt" \
            --out "$out/table" --pictures 4
          $PY evaluate.py $data "$out"/*_[0-9]/last.pt --out "$out/table_last" --pictures 0
          exit ;;
  sup)    flags="--method supervised" ;;
  mt)     flags="--method mean_teacher" ;;
  mt_qw)  flags="--method mean_teacher --weight quality --weight-level class" ;;
  ua_mt)  flags="--method ua_mt" ;;
  ua_mt_qw) flags="--method ua_mt --weight quality --weight-level class" ;;
  qar)    flags="--method supervised --qar 0.01" ;;
  *)      echo "no row $row"; exit 2 ;;
esac
$PY train_ssl.py $data --out "$out/${row}_$seed" --labeled "$labeled" $flags \
  --qp "$out/qp/qp.pt" --width 8 --size 32,48,48 --steps 400 --lr 2e-3 --ema 0.99 \
  --lam-warmup 0.4 --lam-ramp 0.2 --eval-every 50 --window whole --seed "$seed" --overwrite
