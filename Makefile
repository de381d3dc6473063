# make run      set up if needed, then the main job: personalize, RL, evaluate, report   (make run ARGS="--help")
#               on photos of yours: make run MODEL=sd15 SUBJECT=my_dog/ CLASS_NOUN=dog
# make lab      set up if needed, then open JupyterLab here, notebooks and outputs in sight  (make lab ARGS="--no-browser")
# make weights  set up if needed, then build the pocket models                          (make weights ARGS="--help")
# make test     set up if needed, then the tests, on two cores                          (make test ARGS="-k photos -n 0")
# make check    set up if needed, then the linter, its formatter and the type checker
# make notebooks  set up if needed, then execute every notebook that is not yet, for the book (hours on a CPU)
# make book     set up if needed, then the book: site/index.html, offline
# make help     this text            make clean-venv   remove .venv, so that the next call sets it up anew
# PYTHON=python3.12 chooses the Python that .venv is made from (3.11 or newer).

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed-for

# The stamp holds the folder it was installed for. A checkout that was moved, or an environment whose Python is gone,
# is set up again: the scripts in .venv and the editable install name the old place.
ifneq ($(shell cat $(STAMP) 2>/dev/null && test -x $(VENV)/bin/python && echo works),$(CURDIR) works)
$(shell rm -f $(STAMP))
endif

.DEFAULT_GOAL := help
.PHONY: help run lab weights test check notebooks book clean-venv

help:
	@sed -n 's/^# //p' Makefile | sed -n '1,10p'

# An option where a variable is given on make's command line; one of the environment is somebody else's.
option = $(if $(findstring command line,$(origin $(1))),--$(2) '$(subst ','\'',$($(1)))')

run: $(STAMP)
	@$(VENV)/bin/ibkit run $(call option,MODEL,model) $(call option,SUBJECT,subject) \
	    $(call option,CLASS_NOUN,class-noun) $(ARGS)

# Half of the cores a kernel: PyTorch's threads wait for each other busily, so that two kernels that each take all cores
# are five to ten times as slow as one.
lab: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$($(VENV)/bin/python -c \
	    'from ibkit.device import available_cpus; print(max(1, available_cpus() // 2))')} \
	    $(VENV)/bin/jupyter lab --ServerApp.root_dir='$(CURDIR)' $(ARGS)

weights: $(STAMP)
	@$(VENV)/bin/python -m ibkit.pocket.build $(ARGS)

test: $(STAMP)
	@$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

notebooks: $(STAMP)
	@for notebook in notebooks/*.ipynb; do \
	    name=$$(basename $$notebook .ipynb); $(VENV)/bin/ibkit stage $$name --out outputs/book/$$name $(ARGS) || exit; done

book: $(STAMP)
	@$(VENV)/bin/python -c 'import mkdocs, material, mkdocstrings, latex2mathml' 2>/dev/null || \
	    $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[book]'
	@$(VENV)/bin/python -m mkdocs build $(ARGS)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: ibkit needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
	         "name a newer one: make PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up $(VENV) (once; several GB, mostly PyTorch) ..."
	@test -f $(STAMP) || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	    echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable '.[test]'
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

clean-venv:
	rm -rf $(VENV)
