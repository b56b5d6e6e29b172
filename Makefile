# `make train` and `make test` need Python and make, nothing else: the first run sets up .venv.
PRESET ?= laptop
FLAGS ?=

.PHONY: train test test-compile test-triton-lang test-newest lint venv
train: venv
	.venv/bin/python -m train $(PRESET) $(FLAGS)

# Every test that needs no accelerator.
test: venv
	.venv/bin/python -m pytest -n 2 $(FLAGS)

# Compiles for GPUs and TPUs that are not there, in an environment that holds their compilers. Whole files go to a
# process: two cannot load the TPU's compiler.
test-compile:
	@scripts/venv.sh .venv-compile test,compile constraints/tested.txt
	JAX_PLATFORMS=cpu .venv-compile/bin/python -m pytest -m compile -n 2 --dist loadfile $(FLAGS)

# The kernels in the Triton language, in Triton's interpreter and compiled for three GPUs; triton reads once which it is.
test-triton-lang:
	@scripts/venv.sh .venv-triton-lang test,triton-lang constraints/tested.txt
	JAX_PLATFORMS=cpu TRITON_INTERPRET=1 .venv-triton-lang/bin/python -m pytest -m triton_lang -n 2 \
		tests/triton_lang_test.py $(FLAGS)
	JAX_PLATFORMS=cpu .venv-triton-lang/bin/python -m pytest -m triton_lang -n 2 \
		tests/triton_lang_compile_test.py $(FLAGS)

# The same tests as `make test` under the newest JAX.
test-newest:
	@scripts/venv.sh .venv-newest test constraints/newest.txt
	.venv-newest/bin/python -m pytest -n 2 $(FLAGS)

lint: venv
	.venv/bin/ruff check
	.venv/bin/ruff format --check

venv:
	@scripts/venv.sh .venv dev constraints/tested.txt
