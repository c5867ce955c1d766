#!/usr/bin/env bash
# The experiments behind README.md, one data set and number of labels at a time, from the project's
# top folder:
#     bash results/quality/run.sh PART ph2 14     also: ph2 120, cvc 0.2, cvc 0.1, acdc 7, acdc 3
# PART: masks, f, g, scalar, table, parts, ingredients, in this order. PY names the Python.
# The converters make runs/ph2.h5, cvc.h5 and acdc.h5 (the project's README, "Your own data").
set -eu
PY=${PY:-.venv/bin/python}
part=$1 data=$2 labeled=$3 out=runs/q/$2_$3
mkdir -p "$out"
# Image side, masks of a slice, folds; batch, masks of a slice in an epoch, epochs.
case $data-$labeled in
  ph2-14)   size=64 masks=200 folds=3 batch=24 per_image=200 epochs=4 ;;
  ph2-120)  size=64 masks=60  folds=3 batch=24 per_image=25  epochs=4 ;;
  cvc-0.2)  size=64 masks=60  folds=2 batch=24 per_image=40  epochs=4 ;;
  cvc-0.1)  size=64 masks=60  folds=2 batch=24 per_image=60  epochs=5 ;;
  acdc-7)   size=96 masks=60  folds=3 batch=16 per_image=30  epochs=3 ;;
  acdc-3)   size=96 masks=60  folds=3 batch=16 per_image=60  epochs=2 ;;
  *)        echo "no setting for $data $labeled"; exit 2 ;;
esac
case $data in
  ph2)  steps=400 keep=10,40,400 ;;
  cvc)  steps=400 keep=20,100,400 ;;
  acdc) steps=600 keep=40,150,600 ;;
esac

make_g() {  # name, options of train_qp.py
  name=$1; shift
  $PY train_qp.py "runs/$data.h5" --vqm "$out/vqm/vqm.h5" --out "$out/$name" --size $size \
    --batch $batch --per-image $per_image --epochs $epochs --overwrite "$@"
}

table() {  # name of g, which leaves the table in $out/table_NAME
  early=${keep%%,*} rest=${keep#*,}
  $PY evaluate.py "runs/$data.h5" "$out"/f_[012]/step$early.pt "$out"/f_[012]/step${rest%,*}.pt \
    "$out"/f_[012]/step$steps.pt --qp "$out/$1/qp.pt" --second "$out/f_3/best.pt" \
    --split held_out --out "$out/table_$1" --pictures 0
}

case $part in
  masks)  $PY corrupt.py "runs/$data.h5" --out "$out/vqm" --labeled $labeled --size $size \
            --masks $masks --val-masks 5 --folds $folds ;;
  f)      for seed in 0 1 2 3; do  # 3 is the independent network
            $PY train_ssl.py "runs/$data.h5" --out "$out/f_$seed" --labeled $labeled \
              --size $size --steps $steps --keep $keep --batch 12 --lr 1e-3 --eval-every 100 \
              --seed $seed --overwrite
          done ;;
  g)      make_g dense ;;
  scalar) [ $data != acdc ] || per_image=60
          make_g scalar --head scalar --width 32 --batch 32 ;;
  table)  for name in dense scalar; do [ ! -f "$out/$name/qp.pt" ] || table $name; done ;;
  parts)  $PY -m results.quality.parts "runs/$data.h5" "$out"/f_[012]/step*.pt \
            --qp "$out/${4:-dense}/qp.pt" ;;
  ingredients)  # each alone, on one member
          make_g one --members 1
          make_g one_no_quality_loss --members 1 --quality-loss 0
          make_g one_strong --members 1 --strength 1
          make_g one_hard --members 1 --soft 0
          for name in one one_no_quality_loss one_strong one_hard; do
            echo "$name"
            bash "$0" parts $data $labeled $name
          done ;;
esac
