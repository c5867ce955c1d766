#!/usr/bin/env bash
# The experiment behind README.md, from the project's top folder: g with masks that were made with
# and without --balance, --folds and a harvested share.
#     bash results/pilot/run.sh ph2|cvc|acdc
# PY names the Python. The converters make runs/ph2.h5, cvc.h5 and acdc.h5 (the project's README,
# "Your own data").
set -eu
PY=${PY:-.venv/bin/python}
data=$1 out=runs/e/$1
mkdir -p "$out"
case $data in
  ph2)  labeled=14  folds=3 masks=200 epochs=1,3,5,10,15,20
        g_size=64 g_width=64 g_epochs=20 ;;
  cvc)  labeled=0.2 folds=2 masks=40 epochs=1,3,5,10,15,20
        g_size=64 g_width=32 g_epochs=4 ;;
  acdc) labeled=7 folds=2 masks=40 epochs=1,3,5,10,20
        g_size=96 g_width=32 g_epochs=2 ;;
  *)    echo "no dataset $data: ph2, cvc or acdc"; exit 2 ;;
esac

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
make_g paper --no-balance --folds 1 --harvest-share 0.05
make_g balance --balance --folds 1 --harvest-share 0.05
make_g folds --no-balance --folds $folds --harvest-share 0.05
make_g folds_half --no-balance --folds $folds --harvest-share 0.5
$PY -m results.pilot.table "runs/$data.h5" --reference "$out/reference/vqm.h5" \
  "$out"/qp_*/qp.pt --out "$out/quality.md"
