#!/usr/bin/env bash
# The experiments behind README.md. One part at a time, from the project's top folder:
#     bash results/pilot/run.sh quality ph2|cvc|acdc    g with --balance, --folds, harvested share
#     bash results/pilot/run.sh ssl ph2|cvc|acdc "SEEDS" METHOD...
# METHOD: sup mt mt_qw mt_qwc pl_qw qar. PY names the Python. The converters make runs/ph2.h5,
# cvc.h5 and acdc.h5 (the project's README, "Your own data").
set -eu
PY=${PY:-.venv/bin/python}
part=$1 data=$2 out=runs/e/$2
mkdir -p "$out"
case $data in
  ph2)  labeled=14  folds=3 masks=200 epochs=1,3,5,10,15,20 steps=400
        g_size=64 g_width=64 g_epochs=20 ;;
  cvc)  labeled=0.2 folds=2 masks=40 epochs=1,3,5,10,15,20 steps=400
        g_size=64 g_width=32 g_epochs=4 ;;
  acdc) labeled=7 folds=2 masks=40 epochs=1,3,5,10,20 steps=900
        g_size=96 g_width=32 g_epochs=2 ;;
  *)    echo "no dataset $data: ph2, cvc or acdc"; exit 2 ;;
esac

if [ "$part" = quality ]; then
  make_g() {  # name, options of corrupt.py
    name=$1; shift
    $PY corrupt.py "runs/$data.h5" --out "$out/vqm_$name" --labeled $labeled --size $g_size \
      --masks $masks --val-masks 5 --harvest-epochs $epochs "$@"
    $PY train_qp.py "runs/$data.h5" --vqm "$out/vqm_$name/vqm.h5" --out "$out/qp_$name" \
      --head scalar --size $g_size --width $g_width --epochs $g_epochs --overwrite
  }
  $PY corrupt.py "runs/$data.h5" --out "$out/reference" --labeled $labeled --size $g_size \
    --masks 1 --val-masks 10 --harvest-share 0 --harvest-epochs "${epochs%,*},40" --seed 100
  make_g folds_half_balance --folds $folds --harvest-share 0.5 --balance
  cp "$out/qp_folds_half_balance/qp.pt" "$out/qp.pt"  # what the part ssl uses
  make_g paper --no-balance --folds 1 --harvest-share 0.05
  make_g balance --balance --folds 1 --harvest-share 0.05
  make_g folds --no-balance --folds $folds --harvest-share 0.05
  make_g folds_half --no-balance --folds $folds --harvest-share 0.5
  $PY -m results.pilot.table "runs/$data.h5" --reference "$out/reference/vqm.h5" \
    "$out"/qp_*/qp.pt --out "$out/quality.md"
else
  seeds=$3; shift 3
  for method in "$@"; do
    case $method in
      sup)    flags="--method supervised" ;;
      mt)     flags="--method mean_teacher" ;;
      mt_qw)  flags="--method mean_teacher --weight quality --qp $out/qp.pt" ;;
      mt_qwc) flags="--method mean_teacher --weight quality --weight-level class --qp $out/qp.pt" ;;
      pl_qw)  flags="--method pseudo_label --conf-threshold 0 --weight quality --qp $out/qp.pt" ;;
      qar)    flags="--method supervised --qar 0.01 --qp $out/qp.pt" ;;
    esac
    for seed in $seeds; do
      $PY train_ssl.py "runs/$data.h5" --out "$out/${method}_$seed" --labeled $labeled $flags \
        --size 96 --steps $steps --batch 12 --batch-unlabeled 12 --lr 1e-3 --ema 0.99 \
        --eval-every 100 --seed "$seed" --overwrite
    done
  done
fi
