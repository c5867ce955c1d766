# make demo   from nothing to a results table on the embedded phantom: all four stages, about 9 minutes on two cores
# make test   the test suite
PYTHON ?= python3
PY = .venv/bin/python
OUT = runs/demo
STEPS = 300
LABELED = 6
DATA = $(OUT)/phantom.h5
TRAIN = $(PY) train_ssl.py $(DATA) --labeled $(LABELED) --qp $(OUT)/qp/qp.pt --size 64 --steps $(STEPS) --eval-every 100 \
        --batch 16 --batch-unlabeled 16 --lr 2e-3 --ema 0.99 --lam-warmup 0.4 --lam-ramp 0.3 --overwrite

.PHONY: demo test
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

demo: .venv/ready
	$(PY) -m data.phantom --out $(DATA)
	$(PY) -m data.h5 $(DATA) --preview $(OUT)/phantom.png
	$(PY) corrupt.py $(DATA) --out $(OUT)/vqm --labeled $(LABELED) --size 64 --masks 100 --val-masks 10 --preview $(OUT)/masks.png
	$(PY) train_qp.py $(DATA) --vqm $(OUT)/vqm/vqm.h5 --out $(OUT)/qp --size 64 --members 1 --batch 16 --per-image 50 --epochs 3 --overwrite
	$(TRAIN) --out $(OUT)/sup --method supervised
	$(TRAIN) --out $(OUT)/sup_all --method supervised --labeled all
	$(TRAIN) --out $(OUT)/pl --method pseudo_label
	$(TRAIN) --out $(OUT)/pl_qw --method pseudo_label --conf-threshold 0 --weight quality --weight-level class
	$(TRAIN) --out $(OUT)/mt_qw --method mean_teacher --weight quality --weight-level class
	$(TRAIN) --out $(OUT)/qar --method supervised --qar 0.01
	$(PY) evaluate.py $(DATA) $(OUT)/*/best.pt --qp $(OUT)/qp/qp.pt --out $(OUT)/table --split test

test: .venv/ready
	$(PY) -m pytest -q -n 2 tests
