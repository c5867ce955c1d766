# make demo   from nothing to a results table on the embedded phantom: all four stages, about 25 minutes on two cores
# make demo3d the same in 3D: volumes, V-Net, whole-volume scores; 8 minutes on two cores
# make test   the style of the code, then the test suite
PYTHON ?= python3
PY = .venv/bin/python
OUT = runs/demo
STEPS = 300
LABELED = 6
DATA = $(OUT)/phantom.h5
TRAIN = $(PY) train_ssl.py $(DATA) --labeled $(LABELED) --qp $(OUT)/qp/qp.pt --size 64 --steps $(STEPS) --eval-every 100 \
        --batch 16 --batch-unlabeled 16 --lr 2e-3 --lam-warmup 0.4 --lam-ramp 0.3 --overwrite

.PHONY: demo demo3d test
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

demo: .venv/ready
	$(PY) -m data.phantom --out $(DATA)
	$(PY) -m data.h5 $(DATA) --preview $(OUT)/phantom.png
	$(PY) corrupt.py $(DATA) --out $(OUT)/vqm --labeled $(LABELED) --size 64 --masks 100 --val-masks 10 --overwrite --preview $(OUT)/masks.png
	$(PY) train_qp.py $(DATA) --vqm $(OUT)/vqm/vqm.h5 --out $(OUT)/qp --size 64 --members 1 --batch 16 --per-image 50 --epochs 3 --overwrite
	$(TRAIN) --out $(OUT)/sup --method supervised
	$(TRAIN) --out $(OUT)/sup_all --method supervised --labeled all
	$(TRAIN) --out $(OUT)/pl --method pseudo_label
	$(TRAIN) --out $(OUT)/pl_qw --method pseudo_label --conf-threshold 0 --weight quality --weight-level class
	$(TRAIN) --out $(OUT)/pl_correct --method pseudo_label --conf-threshold 0 --correct --weight quality
	$(TRAIN) --out $(OUT)/mt_correct --method mean_teacher --correct --weight quality
	$(TRAIN) --out $(OUT)/qar --method supervised --qar 0.01
	$(PY) evaluate.py $(DATA) $(OUT)/*/best.pt --qp $(OUT)/qp/qp.pt --out $(OUT)/table --split test
	$(PY) evaluate.py $(DATA) $(OUT)/mt_correct/best.pt --predict --split test --qp $(OUT)/qp/qp.pt --out $(OUT)/new --overwrite

demo3d: OUT = runs/demo3d
demo3d: TRAIN = $(PY) train_ssl.py $(DATA) --labeled 4 --qp $(OUT)/qp/qp.pt --size 32,48,48 --width 8 --steps 120 --eval-every 60 --lr 2e-3 \
        --lam-warmup 0.4 --lam-ramp 0.3 --window whole --overwrite
demo3d: .venv/ready
	$(PY) -m data.phantom --out $(DATA) --dims 3 --train 30 --val 4 --test 8 --depth 32 --size 64
	$(PY) -m data.h5 $(DATA) --preview $(OUT)/phantom.png
	$(PY) corrupt.py $(DATA) --out $(OUT)/vqm --labeled 4 --size 32,48,48 --patches 4 --masks 30 --val-masks 4 --harvest-epochs 1,3,6 --overwrite --preview $(OUT)/masks.png
	$(PY) train_qp.py $(DATA) --vqm $(OUT)/vqm/vqm.h5 --out $(OUT)/qp --size 16,24,24 --members 1 --batch 8 --per-image 30 --epochs 3 --overwrite
	$(TRAIN) --out $(OUT)/sup --method supervised
	$(TRAIN) --out $(OUT)/mt --method mean_teacher
	$(TRAIN) --out $(OUT)/mt_qw --method mean_teacher --weight quality --weight-level class
	$(TRAIN) --out $(OUT)/ua_mt_qw --method ua_mt --weight quality --weight-level class
	$(TRAIN) --out $(OUT)/qar --method supervised --qar 0.01
	$(PY) evaluate.py $(DATA) $(OUT)/*/best.pt --qp $(OUT)/qp/qp.pt --window whole --out $(OUT)/table --split test
	$(PY) evaluate.py $(DATA) $(OUT)/mt_qw/best.pt --predict --split test --qp $(OUT)/qp/qp.pt --window whole --out $(OUT)/new --overwrite

test: .venv/ready
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m pytest -q -n 2 --dist worksteal tests
