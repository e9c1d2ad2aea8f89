# Two commands for a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test slow lint clean

demo: .venv/run
	$(PY) prepare.py config/demo.py
	test -f out/demo/model.pt || $(PY) train.py config/demo.py
	$(PY) finetune_glue.py config/demo.py --glue_init=scratch
	$(PY) finetune_glue.py config/demo.py --glue_init=run
	$(PY) -m pip install -q $$(grep matplotlib requirements-dev.txt)
	$(PY) -m tools.plot out/demo
	$(PY) -m tools.fill_mask out/demo "returns the <mask> of the array."
	$(PY) -m tools.fill_mask out/demo "if <mask> is given, the result is written to it."
	$(PY) -m tools.fill_mask out/demo "the number of <mask> in the graph."
	@echo
	@echo "To try next ($(PY) is the python to use):"
	@echo "  $(PY) -m tools.fill_mask out/demo --interactive"
	@echo "  $(PY) train.py config/demo.py --out_dir=out/wide --n_embd=384 --n_inner=1536 && $(PY) -m tools.plot out/demo out/wide"
	@echo "  $(PY) prepare.py config/cpu.py --sources=FOLDER_OF_TEXT && $(PY) train.py config/cpu.py"

test: .venv/dev
	$(PY) -m pytest -q

slow: .venv/dev
	$(PY) -m pytest -q -m slow

lint: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv data out
