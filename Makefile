# make demo    from nothing to a table and a conclusion: all four stages on the embedded phantom
# make demo3d  the same in 3D: volumes, V-Net, whole-volume scores
# make test    the style of the code, then the test suite
# make .venv/ready  installs requirements.txt alone
# make clean   deletes what the demos made, of all seeds
#
# A demo that was stopped goes on. It does not see that code or options have changed: make clean.
# SEED=3 make demo      other patients, other networks
# make demo LABELED=3   any variable of a demo below can be given like this
# PYTHON=python3.12     what makes .venv; FOLDER=runs: where demos go, without spaces
PYTHON ?= python3
PY = .venv/bin/python
SEED ?= 0
FOLDER ?= runs
unexport PYTHONDONTWRITEBYTECODE  # modules are compiled when first imported
SUFFIX = $(if $(filter-out 0,$(SEED)),-seed$(SEED))

.PHONY: demo demo3d story test clean
demo: export OUT = $(FOLDER)/demo$(SUFFIX)
demo: export PHANTOM = --train 30 --val 6 --test 16 --size 64 --unlabeled 60 --foreign 0.5
demo: export LABELED = 4
demo: export METHOD = fixmatch
demo: export MASKS = --size 48 --masks 100 --val-masks 10 --harvest-epochs 1,3,6
demo: export G = --size 48 --width 8 --members 1 --batch 16 --per-image 40 --epochs 7 --strength 1
demo: export F = --size 48 --width 8 --batch 8 --batch-unlabeled 8 --steps 500 --eval-every 250 \
    --lr 2e-3 --geometry 2
demo: export GUIDANCE = --correct --weight quality
demo: export WINDOW =

demo3d: export OUT = $(FOLDER)/demo3d$(SUFFIX)
demo3d: export PHANTOM = --dims 3 --train 30 --val 4 --test 8 --depth 16 --size 48 \
    --unlabeled 30 --foreign 0.5
demo3d: export LABELED = 4
demo3d: export METHOD = fixmatch
demo3d: export MASKS = --size 16,48,48 --masks 200 --val-masks 8 --harvest-epochs 1,3,10
demo3d: export G = --size 16,24,24 --members 1 --batch 8 --per-image 100 --epochs 10 --strength 1
demo3d: export F = --size 16,48,48 --width 8 --dropout 0 --steps 450 --eval-every 150 --lr 2e-3
demo3d: export GUIDANCE = --correct --weight quality
demo3d: export WINDOW = --window whole

demo demo3d: .venv/ready
	@$(MAKE) --no-print-directory -j 2 story

test: .venv/ready
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m pytest -q -n 2 --dist worksteal tests

clean:
	rm -rf $(FOLDER)/demo $(FOLDER)/demo-seed* $(FOLDER)/demo3d $(FOLDER)/demo3d-seed*

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --no-compile -r requirements.txt
	touch $@

# The story that both demos tell. A step prints into LOG/STEP.txt, which is there when it is done.
OUT ?= $(FOLDER)/demo$(SUFFIX)
DATA = $(OUT)/phantom.h5
LOG = $(OUT)/log
QP = --qp $(OUT)/qp/qp.pt
SAME = --seed $(SEED) --resume
TRAIN = $(PY) train_ssl.py $(DATA) $(F) $(WINDOW) $(SAME) --out $(OUT)
RUNS = supervised unguided guided all_labels
BEST = $(RUNS:%=$(OUT)/%/best.pt)

define step  # TEXT,COMMAND: says TEXT, runs COMMAND, shows what it printed if it fails
@echo "$(1)"
@mkdir -p $(LOG)
@$(2) > $@.part 2>&1 || { cat $@.part; exit 1; }
@mv $@.part $@
endef

story: export OMP_NUM_THREADS ?= $(shell expr \( $$(getconf _NPROCESSORS_ONLN) + 1 \) / 2)
story: $(LOG)/table.txt $(LOG)/new.txt
	@sed -n '/^| run/,/^$$/p' $<
	@sed -n '/^warning/p' $(LOG)/*.txt
	@$(PY) -m results.demo.conclusion $(OUT)/table --new $(OUT)/new
	@echo "Pictures: $(OUT)/table/*.png; new images, the worst first: $(OUT)/new"

$(LOG)/phantom.txt:
	$(call step,phantoms -> $(DATA),$(PY) -m data.phantom --out $(DATA) --seed $(SEED) $(PHANTOM))

$(LOG)/masks.txt: $(LOG)/phantom.txt
	$(call step,stage 1: masks of variable quality -> $(OUT)/vqm,$(PY) corrupt.py $(DATA) \
	    --labeled $(LABELED) $(MASKS) $(SAME) --out $(OUT)/vqm --preview $(OUT)/masks.png)

$(LOG)/g.txt: $(LOG)/masks.txt
	$(call step,stage 2: the quality predictor g -> $(OUT)/qp,$(PY) train_qp.py $(DATA) \
	    --vqm $(OUT)/vqm/vqm.h5 $(G) $(SAME) --out $(OUT)/qp)

$(LOG)/supervised.txt: $(LOG)/phantom.txt
	$(call step,stage 3: supervised with $(LABELED) labeled patients -> $(OUT)/supervised,\
	    $(TRAIN)/supervised --labeled $(LABELED))

$(LOG)/unguided.txt: $(LOG)/phantom.txt
	$(call step,stage 3: $(METHOD) without guidance -> $(OUT)/unguided,$(TRAIN)/unguided \
	    --labeled $(LABELED) --method $(METHOD))

$(LOG)/guided.txt: $(LOG)/g.txt
	$(call step,stage 3: $(METHOD) guided by g -> $(OUT)/guided,$(TRAIN)/guided \
	    --labeled $(LABELED) --method $(METHOD) $(QP) $(GUIDANCE))

$(LOG)/all_labels.txt: $(LOG)/phantom.txt
	$(call step,stage 3: supervised with all labels -> $(OUT)/all_labels,$(TRAIN)/all_labels)

$(LOG)/table.txt: $(LOG)/guided.txt $(RUNS:%=$(LOG)/%.txt)  # the longest chain first
	$(call step,stage 4: the table -> $(OUT)/table,$(PY) evaluate.py $(DATA) $(BEST) $(QP) \
	    $(WINDOW) --split test --out $(OUT)/table)

$(LOG)/new.txt: $(LOG)/guided.txt
	$(call step,stage 4: masks of new images -> $(OUT)/new,$(PY) evaluate.py $(DATA) \
	    $(OUT)/guided/best.pt $(QP) $(WINDOW) --predict --split unlabeled --overwrite --out $(OUT)/new)
