# make demo        the whole recipe on the sandbox, in minutes: three models beside the base, evaluated, figures
# make test        the tests
# make lint        style, formatting, types
# make lessons     docs/lessons as notebooks, of the demo's run; makes that if there is none
# make replicate   the methods side by side and the ablations over five seeds, about an hour; FLAGS='--seeds 2'
# make frontier    the paper's Figure 2 over lambda, methods, seeds, two hours; STUDY=equal-tokens likewise
# make assignment  OUT=folder: a course, a tree for students and one for instructors; FLAGS='--only week3'
# make grade       which of the course's exercises are solved; E=name: one of them
# make clean       delete runs/ and the virtual environment
#
# Needs Python >= 3.10. All is installed into .venv; a step that was done is not done again, and each stage goes on
# where it was stopped.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
DEMO := runs/demo

# Without an NVIDIA GPU, a build of torch for the CPU alone saves gigabytes. Linux only: elsewhere the ordinary one is it.
# A version with a "+cpu" build counts as newer than the same version without, so pip takes that one where it finds it.
# Where the index of such builds cannot be reached, pip goes on without; no retries, because it would tell of each.
TORCH_CPU := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo demo-mixture demo-tars demo-sft-direct demo-direct test lint lessons replicate frontier clean
.DELETE_ON_ERROR:

# On two cores: one thread a process, or torch's threads would wait for each other beside any neighbour. Two models
# are trained side by side, and two processes attack.
demo: export OMP_NUM_THREADS = 1
demo: $(VENV)/.demo
	@mkdir -p $(DEMO) && date +%s > $(DEMO)/started
	$(RUN) 01_build_mixture.py --preset sandbox --out $(DEMO)/data
	@echo "beside what follows, a model without reasoning is trained; its log is $(DEMO)/direct.log"
	@$(MAKE) --no-print-directory -j2 demo-tars demo-direct
	$(VENV)/bin/torchrun --nproc-per-node 2 04_attack_eval.py --preset sandbox --data $(DEMO)/data --out $(DEMO)/eval \
		--no-reasoning base --models base=lib/sandbox/base sft=$(DEMO)/sft rl-direct=$(DEMO)/rl-direct tars=$(DEMO)/rl
	@echo "make demo: $$(( $$(date +%s) - $$(cat $(DEMO)/started) )) seconds; read $(DEMO)/eval/report.md, or open report.html beside it"

demo-mixture:
	$(RUN) 02_sft_warmstart.py --preset sandbox --data $(DEMO)/data --out $(DEMO)/sft
	$(RUN) 01_build_mixture.py --preset sandbox --rainbow $(DEMO)/sft --out $(DEMO)/mixture

demo-tars: demo-mixture
	$(RUN) 03_rl_train.py --preset sandbox --data $(DEMO)/mixture --model $(DEMO)/sft --out $(DEMO)/rl

demo-sft-direct:
	@$(RUN) 02_sft_warmstart.py --preset sandbox --data $(DEMO)/data --no-reasoning --out $(DEMO)/sft-direct \
		> $(DEMO)/direct.log 2>&1 || { tail -n 3 $(DEMO)/direct.log; exit 1; }

demo-direct: demo-sft-direct demo-mixture
	@$(RUN) 03_rl_train.py --preset sandbox --data $(DEMO)/mixture --no-reasoning --max-new-tokens 12 --kl-coef 0.3 --temperature 0.7 \
		--model $(DEMO)/sft-direct --out $(DEMO)/rl-direct \
		>> $(DEMO)/direct.log 2>&1 || { tail -n 3 $(DEMO)/direct.log; exit 1; }

test: $(VENV)/.test
	$(RUN) -m pytest

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy $(wildcard 0*.py) lib

lessons: $(VENV)/.test
	@[ -f $(DEMO)/eval/results.json ] || $(MAKE) --no-print-directory demo
	OMP_NUM_THREADS=1 $(RUN) docs/lessons/build.py

replicate: $(VENV)/.demo
	$(RUN) -m lib.compare.study replicate $(FLAGS)
	$(RUN) -m lib.compare.study ablations $(FLAGS)

frontier: $(VENV)/.demo
	$(RUN) -m lib.compare.study $(or $(STUDY),frontier) $(FLAGS)

.PHONY: assignment grade
assignment: $(VENV)/.test
	@test -n "$(OUT)" || { echo "error: where to? make assignment OUT=folder" >&2; exit 2; }
	$(RUN) -m lib.tools.course "$(OUT)" $(FLAGS)

grade: $(VENV)/.test
	@$(RUN) -m lib.tools.grade $(E)

clean:
	rm -rf runs $(VENV)

# Stamps: a file that is newer than the requirements says that they are installed.

$(VENV)/.stages: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10: make ... PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
		echo "no NVIDIA GPU: installing torch for the CPU"; \
		$(PIP) --retries 0 --timeout 10 --extra-index-url $(TORCH_CPU_INDEX) "$(TORCH_CPU)" || \
		$(PIP) "$(TORCH_CPU)"; \
	fi
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.demo: $(VENV)/.stages
	$(PIP) "$$(grep ^matplotlib requirements-dev.txt)" || echo "no matplotlib: the report will have tables, no figures"
	@touch $@

$(VENV)/.test: $(VENV)/.stages requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@
