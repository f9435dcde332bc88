# Everything is installed into VENV; nothing outside it is touched, and a second run installs nothing.
#   make quickstart              compare two policies with no cache, on a small model that comes with the package
#   make test                    the tests, on the CPU
#   make lint                    ruff and strict mypy
#   make docs                    the documentation as a site, in site/; warnings are errors
#   make PYTHON=python3.12 VENV=.venv-3.12 test
#   make TORCH=2.12.0 VENV=.venv-2.12 test
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
PYTEST_ARGS ?= -n 2 --dist loadscope

bin = $(VENV)/bin
pip_install = $(bin)/python -m pip install -qq --disable-pip-version-check
torch = $(VENV)/.torch-$(TORCH)

.PHONY: quickstart test lint docs clean

quickstart: $(VENV)/.dcache
	$(bin)/dcache compare --policies elastic,dkv

test: $(VENV)/.dcache-ci
	$(bin)/pytest $(PYTEST_ARGS)

lint: $(VENV)/.dcache-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	PYTHON=$(abspath $(bin)/python) tools/types.sh

docs: $(VENV)/.dcache-docs
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict --site-dir site
	@echo "open site/index.html, or for the search: $(bin)/python -m http.server -d site"

clean:
	rm -rf .venv build dist site types *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.dcache: pyproject.toml $(torch)
	@echo "installing dcache"
	@$(pip_install) -e .
	@touch $@

$(VENV)/.dcache-%: pyproject.toml $(torch)
	@echo "installing dcache[$*]"
	@$(pip_install) -e ".[$*]"
	@touch $@

$(torch): $(VENV)/.created
	@tools/install_torch.sh $(bin)/python $(TORCH)
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'dcache needs Python 3.11 or newer, which $(PYTHON) is not; try: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@
