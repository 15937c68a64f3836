# `make help` lists the targets. PYTHON is the interpreter that the environment is made with.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# What goes wrong is still printed; what takes long is said before.
INSTALL = $(RUN) -m pip install --quiet --quiet --disable-pip-version-check
# What is installed already: all that a picture needs; everything; nbgrader on top of it.
PICTURES = $(VENV)/.installed-pictures
INSTALLED = $(VENV)/.installed
CLASS = $(VENV)/.installed-class

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick lab notebooks minutes address site site-look release figures targets \
        benchmark bench clean classroom classroom-check community \
        train-autoencoder train-text-encoder train-latent-diffusion train-clip train-segmenter \
        train-style train-upsampler train-rgba-autoencoder train-layerdiff train-distillation

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r name text; do printf '  make %-24s %s\n' "$$name" "$$text"; done

setup: $(INSTALLED)  ## make the environment (.venv) and install everything into it

# Each stamp is written last: an installation that was cut short is taken up again.
# torch comes first and by its exact version, so that a CPU build is taken where one is on offer.
$(PICTURES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The tested versions need Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@echo "making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch, by far the largest part: this takes minutes"
	@$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@echo "installing diffusers and the rest of what a picture needs"
	@$(INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(INSTALLED): $(PICTURES)
	@echo "installing JupyterLab, pytest and the rest of what notebooks and tests need"
	@$(INSTALL) --constraint constraints.txt --editable ".[development,notebooks,site]"
	@touch $@

# Not with the rest: it puts its menus into JupyterLab, and makes that start later.
$(CLASS): $(INSTALLED)
	@echo "installing nbgrader, for a class and for its tests"
	@$(INSTALL) --constraint constraints.txt --editable ".[class]"
	@touch $@

demo: $(PICTURES)  ## render the example layouts into outputs/, with IoU and CLIP score
	@echo "drawing examples/*.json into outputs/"
	@$(RUN) -m lrd_helpers render examples/*.json --output outputs

test: $(CLASS)  ## ruff and every test, notebooks and browser included
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tests/install_browser.py
	$(RUN) tests/run_all.py

test-quick: $(CLASS)  ## ruff and the quick tests: neither notebooks nor browser nor trainings
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tests/run_all.py --quick

lab: $(INSTALLED)  ## open the notebooks in JupyterLab
	$(RUN) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

notebooks: $(INSTALLED)  ## run the notebooks from the top and save them (ARGS="01_ddpm": only that one)
	$(RUN) tests/execute_notebooks.py $(ARGS)

minutes: $(INSTALLED)  ## how long each notebook takes (ARGS="--write": into their goals, too)
	$(RUN) tests/course_minutes.py $(ARGS)

classroom: $(CLASS)  ## the teaching kit, into outputs/classroom (ARGS="--output FOLDER")
	$(RUN) classroom/kit.py $(ARGS)

classroom-check: $(CLASS)  ## rehearse all assignments with nbgrader: minutes (ARGS="01_ddpm")
	$(RUN) classroom/rehearsal.py $(ARGS)

address: $(INSTALLED)  ## write the address in pyproject.toml, and the list of notebooks, where they belong
	$(RUN) tests/public_address.py
	$(RUN) examples/community/generate.py

community: $(INSTALLED)  ## write the one-file pipeline for diffusers, examples/community, from the package
	$(RUN) examples/community/generate.py

site: $(INSTALLED)  ## build the site from the executed notebooks into outputs/site, without a network
	$(RUN) site/build_site.py

site-look: $(INSTALLED)  ## open every page of the built site wide, narrow and dark, and ask axe
	$(RUN) site/look.py

release: $(INSTALLED)  ## build the wheel and the source archive into dist/, and try them
	$(RUN) tests/release.py

train-autoencoder: $(INSTALLED)  ## train the autoencoder (first of all models)
	$(RUN) -m lrd_helpers.training.autoencoder $(ARGS)

train-text-encoder: $(INSTALLED)  ## train what the U-Net reads by (minutes)
	$(RUN) -m lrd_helpers.training.text_encoder $(ARGS)

train-latent-diffusion: $(INSTALLED)  ## train the U-Net (needs the autoencoder and the text encoder)
	$(RUN) -m lrd_helpers.training.latent_diffusion $(ARGS)

train-clip: $(INSTALLED)  ## train the model behind the CLIP score
	$(RUN) -m lrd_helpers.training.clip $(ARGS)

train-segmenter: $(INSTALLED)  ## train the detector behind the IoU
	$(RUN) -m lrd_helpers.training.segmenter $(ARGS)

train-style: $(INSTALLED)  ## train style from a reference picture (needs the U-Net)
	$(RUN) -m lrd_helpers.training.style $(ARGS)

train-upsampler: $(INSTALLED)  ## train super-resolution in latents (needs the autoencoder)
	$(RUN) -m lrd_helpers.training.upsampler $(ARGS)

train-rgba-autoencoder: $(INSTALLED)  ## train the autoencoder of layers (needs the autoencoder)
	$(RUN) -m lrd_helpers.training.rgba_autoencoder $(ARGS)

train-layerdiff: $(INSTALLED)  ## train the layered model (needs the autoencoder of layers)
	$(RUN) -m lrd_helpers.training.layerdiff $(ARGS)

train-distillation: $(INSTALLED)  ## train the student that draws in four steps (needs the pipeline)
	$(RUN) -m lrd_helpers.training.distillation $(ARGS)

figures: $(INSTALLED)  ## draw the pictures in figures/ again
	$(RUN) benchmarks/figures.py

targets: $(INSTALLED)  ## measure how good the shipped models are
	$(RUN) benchmarks/targets.py
	$(RUN) benchmarks/layers.py

benchmark: $(INSTALLED)  ## measure all methods on 220 layouts: hours; goes on where it was cut (ARGS="--limit 26")
	$(RUN) -m lrd_helpers benchmark $(ARGS)

bench: $(INSTALLED)  ## measure time and memory against the budgets
	$(RUN) benchmarks/budgets.py
	$(RUN) benchmarks/speed.py

clean:  ## remove the environment, caches and outputs (trained checkpoints in runs/ stay)
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
