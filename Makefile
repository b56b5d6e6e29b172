# `make train` and `make test` need Python and make, nothing else: the first run sets up .venv.
PRESET ?= laptop
FLAGS ?=

.PHONY: train test test-compile test-newest lint venv
train: venv
	.venv/bin/python -m train $(PRESET) $(FLAGS)

# Every test that needs no accelerator.
test: venv
	.venv/bin/python -m pytest -n 2 $(FLAGS)

# Compiles for GPUs and TPUs that are not there, in an environment that holds their compilers.
test-compile:
	@scripts/venv.sh .venv-compile test,compile constraints/tested.txt
	JAX_PLATFORMS=cpu .venv-compile/bin/python -m pytest -m compile $(FLAGS)

# The same tests as `make test` under the newest JAX.
test-newest:
	@scripts/venv.sh .venv-newest test constraints/newest.txt
	.venv-newest/bin/python -m pytest -n 2 $(FLAGS)

lint: venv
	.venv/bin/ruff check
	.venv/bin/ruff format --check

venv:
	@scripts/venv.sh .venv dev constraints/tested.txt
