# Everything a bare clone needs: Python 3.11 or later, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# The TPU compiler, which tests compile with: in a folder of its own, for in the environment jax would try it as a TPU.
COMPILER := .venv/libtpu/installed
# The same for XLA's GPU compiler: with it in the environment, jax would look for a GPU.
GPU_COMPILER := .venv/gpu-compiler/installed
# Most of a test's time is compiling, on one core; a file's tests share what they compile.
WORKERS = --numprocesses 2 --dist loadfile
CONSTRAINTS = constraints/$$($(BIN)/python -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt

.PHONY: demo test test-slow parity plans gpu lint address clean

demo: $(INSTALLED)
	@$(BIN)/python train.py pretrain demo
	@$(BIN)/python sample.py runs/demo --temperature 0.7 --top_p 0.9 --max_new_tokens 96 \
	  --prompt "def fibonacci(n):" --prompt "class Queue:" --prompt "import os"
	@printf '\n%s\n' 'Next, try:' \
	  '  $(BIN)/python sample.py runs/demo --prompt "for line in" --temperature 0.8 --samples 3' \
	  '  $(BIN)/python train.py pretrain demo --steps 1000' \
	  '  $(BIN)/python train.py pretrain demo --run_dir runs/deeper --model.num_layers 8' \
	  '  $(BIN)/gemma inspect runs/demo'

test: lint $(COMPILER)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-slow: .venv/slow-installed $(COMPILER) $(GPU_COMPILER)
	$(BIN)/python -m pytest -m slow --ignore tests/planning/test_gpu_compiler.py
	PYTHONPATH=.venv/gpu-compiler $(BIN)/python -m pytest -m slow tests/planning/test_gpu_compiler.py

# In an environment of its own: nothing else needs transformers, torch, PEFT and TRL.
parity: .venv-parity/installed
	GEMMA_JAX_PARITY=1 .venv-parity/bin/python -m pytest tests/test_parity.py tests/commands/test_verify.py \
	  tests/pretrained/test_transformers.py tests/pretrained/test_gguf.py tests/pretrained/test_bitsandbytes.py \
	  tests/pretrained/test_peft.py tests/pretrained/test_peft_live.py tests/data/test_trl.py tests/training/test_trl_dpo.py \
	  tests/weights/test_quantized.py

.venv-parity/installed: $(INSTALLED) constraints/parity.txt
	@test -x .venv-parity/bin/python || $(BIN)/python -m venv .venv-parity
	@echo "Installing gemma_jax, transformers, torch and PEFT into .venv-parity (once)"
	@$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable >.venv-parity/constraints.txt
	@.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]" \
	  bitsandbytes peft torch transformers trl xllamacpp --constraint .venv-parity/constraints.txt --constraint constraints/parity.txt
	@touch $@

# The shipped configs compiled at full size for their TPUs, into docs/plans.md: an hour on two cores; training and
# sampling for GPUs, into docs/gpu.md: a quarter of an hour.
plans: $(COMPILER) $(GPU_COMPILER)
	TPU_LIBRARY_PATH=.venv/libtpu/libtpu/libtpu.so $(BIN)/python benchmarks/tpu_plans.py
	PYTHONPATH=.venv/gpu-compiler $(BIN)/python benchmarks/gpu_plans.py

# On a machine with a GPU, whose own Python has jax: measures into docs/gpu.md. A failed part does not stop the others.
GPU_PARTS ?= tests train decode-2b decode-7b peers
gpu:
	$(PYTHON) benchmarks/gpu.py install $(if $(WHEELS),--wheels $(WHEELS))
	@failed=; for part in $(GPU_PARTS); do $(PYTHON) benchmarks/gpu.py $$part || failed="$$failed $$part"; done; \
	  $(PYTHON) benchmarks/gpu.py merge || failed="$$failed merge"; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

# Where this repository is published: `make address OWNER=name` writes it into the files that name it.
address:
	sed -i -E 's#(github|github\.com)/[A-Za-z0-9_-]+/gemma_jax#\1/$(OWNER)/gemma_jax#' setup.py README.md notebooks/*.ipynb

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# Made again when the dependencies change; the constraints are those of the environment's own Python.
$(INSTALLED): setup.py constraints/py311.txt constraints/py312.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gemma_jax needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing gemma_jax into .venv (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]" \
	  --constraint $(CONSTRAINTS)
	@touch $@

.venv/slow-installed: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test-slow]" \
	  --constraint $(CONSTRAINTS)
	@touch $@

$(COMPILER): $(INSTALLED)
	@echo "Installing the TPU compiler into .venv/libtpu (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/libtpu \
	  libtpu --constraint $(CONSTRAINTS)
	@touch $@

$(GPU_COMPILER): $(INSTALLED)
	@echo "Installing XLA's GPU compiler into .venv/gpu-compiler (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/gpu-compiler \
	  jax-cuda13-pjrt jax-cuda13-plugin nvidia-cuda-nvcc nvidia-nvvm --constraint $(CONSTRAINTS)
	@touch $@

clean:
	rm -rf .venv .venv-parity build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
