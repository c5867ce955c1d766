#!/usr/bin/env bash
# The experiments behind README.md, from the project's top folder:
#     bash results/methods/run.sh g cvc|acdc               the quality predictor (first)
#     bash results/methods/run.sh ROW cvc|acdc SEED        one run
#     bash results/methods/run.sh table cvc|acdc           the table of all runs that are there
# ROW is one of `case` below, with _qw, _qar or both behind it, as in mt_qw or bcp_qw_qar.
# PY names the Python. The converters make runs/cvc.h5 and acdc.h5 (the project's README, "Your own
# data").
set -eu
PY=${PY:-.venv/bin/python}
row=$1 data=$2 seed=${3:-0} out=runs/m/$2
mkdir -p "$out"
case $data in
  cvc)  labeled=0.2 folds=2 per_image=40 epochs=4 ;;
  acdc) labeled=7   folds=3 per_image=30 epochs=5 ;;
  *)    echo "no dataset $data: cvc or acdc"; exit 2 ;;
esac

case $row in
  g)  $PY corrupt.py "runs/$data.h5" --out "$out/vqm" --labeled $labeled --size 64 --masks 60 \
        --val-masks 5 --folds $folds
      $PY train_qp.py "runs/$data.h5" --vqm "$out/vqm/vqm.h5" --out "$out/qp" --size 64 \
        --members 1 --batch 24 --per-image $per_image --epochs $epochs --overwrite
      exit ;;
  table)  $PY evaluate.py "runs/$data.h5" "$out"/*_[0-9]/best.pt --out "$out/table" --pictures 0
      exit ;;
esac

flags=""
case $row in *_qar) flags="$flags --qar 0.01" ;; esac
case $row in *_qw*) flags="$flags --weight quality --weight-level class" ;; esac
method=${row%_qar} method=${method%_qw}
case $method in
  sup)      flags="--method supervised $flags" ;;
  pl)       flags="--method pseudo_label --conf-threshold 0 $flags" ;;
  pl_t)     flags="--method pseudo_label --conf-threshold 0.9 $flags" ;;
  pl_c)     flags="--method pseudo_label --conf-threshold 0 $flags --weight confidence" ;;
  mt)       flags="--method mean_teacher $flags" ;;
  ua_mt|ict|cps) flags="--method $method $flags" ;;
  cl)       flags="--method contrastive $flags" ;;
  fixmatch|unimatch) flags="--method $method --conf-threshold 0.95 --lam 1 $flags" ;;
  bcp)      flags="--method bcp --lam 0.5 $flags" ;;
  *)        echo "no row $row"; exit 2 ;;
esac
$PY train_ssl.py "runs/$data.h5" --out "$out/${row}_$seed" --labeled $labeled $flags \
  --qp "$out/qp/qp.pt" --size 64 --steps 600 --batch 12 --batch-unlabeled 12 --lr 1e-3 --ema 0.99 \
  --lam-warmup 0.4 --lam-ramp 0.2 --eval-every 100 --seed "$seed" --overwrite
