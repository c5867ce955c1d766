#!/usr/bin/env bash
# The experiments of protocol.md, one data set at a time, from the project's top folder:
#     bash results/evidence/run.sh PART ph2|cvc|acdc|acdc_3 [FAMILY ...]
# PART: g, grid, seeds, plain, blind, qw, conf, qar, in this order; then
# `python -m results.evidence.table DATA --add`. Several may run at once on the same list; what is
# finished is passed over. PY names the Python. The converters and
# `python -m results.evidence.run split` make runs/DATA.h5 with a test split (protocol.md).
set -eu
PY=${PY:-.venv/bin/python}
part=$1 data=$2 out=runs/v/$2
shift 2
mkdir -p "$out"
case $data in
  ph2)  labeled=14 masks=200 folds=3 batch=24 per_image=200 epochs=4 ;;
  cvc)  labeled=4  masks=60  folds=2 batch=24 per_image=40  epochs=4 ;;
  acdc) labeled=7  masks=60  folds=3 batch=16 per_image=30  epochs=3 ;;
  acdc_3) labeled=3 masks=60 folds=3 batch=16 per_image=60 epochs=3 ;;
  *)    echo "no setting for $data"; exit 2 ;;
esac
run() { $PY -m results.evidence.run $data "$@"; }

if [ "$part" = g ]; then
  file=runs/${data%_*}.h5
  $PY corrupt.py $file --out "$out/vqm" --labeled $labeled --size 64 --masks $masks \
    --val-masks 5 --folds $folds
  $PY train_qp.py $file --vqm "$out/vqm/vqm.h5" --out "$out/g" --size 64 --batch $batch \
    --per-image $per_image --epochs $epochs
  exit
fi
for family in "$@"; do
  case $family in  # squared differences of probabilities are small
    mean_teacher|ict) lams="0.3 1 3" ;;
    *)                lams="0.1 0.3 1" ;;
  esac
  [ $family = supervised ] && { run --families supervised --rows none --lams 0; continue; }
  case $part in
    grid)  run --families $family --rows none correct_qw --lams $lams --seeds 0 ;;
    seeds) run --families $family --rows none correct_qw --seeds 1 2
           run --families $family --rows full --like correct_qw ;;
    plain) run --families $family --rows correct --like correct_qw ;;
    blind) run --families $family --rows blind blind_qw --like correct_qw ;;
    qw)    run --families $family --rows qw_pixel --lams $lams --seeds 0
           run --families $family --rows qw_pixel --seeds 1 2
           run --families $family --rows qw qw_class oracle oracle_pixel shuffled_pixel \
             --like qw_pixel ;;
    conf)  run --families $family --rows conf conf_class conf_pixel --like none ;;
    qar)   run --families $family --rows qar qar_hard qar_fresh qw_pixel_qar --like none ;;
    *)     echo "no part $part"; exit 2 ;;
  esac
done
