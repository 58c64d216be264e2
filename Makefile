# `make demo` and `make test` need nothing but Python 3.10 or newer: they make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_WORKERS ?= 2

.PHONY: install kernel emulation wheel demo app space docs test test-all style quality clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; say which by `make PYTHON=...`")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Compiles the DCNv3 kernel for what this machine has the tools for; without a compiler it does nothing.
kernel: install
	$(BIN)/python dcnv3_kernel/build.py

# The GPU kernels as a CPU runs them, for the tests alone.
emulation: install
	$(BIN)/python dcnv3_kernel/build.py --backend emulation

# Two wheels in dist/, both with the Triton kernels: pure Python, and one with the compiled CPU kernel in it as well.
wheel: kernel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	INTERNIMAGE_HF_KERNELS="$$(ls -d dcnv3_kernel/build/torch-stable-abi*-cpu-*)" $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	ls -l dist

# Fine-tunes a small model on scikit-learn's digits, and uses it: under three minutes on two cores.
demo: install
	-$(BIN)/python dcnv3_kernel/build.py
	$(BIN)/python examples/image_classification.py

# The page that shows what a model looks at; `make app MODEL=OpenGVLab/internimage_t_1k_224` for another than the small one.
app: install
	-$(BIN)/python dcnv3_kernel/build.py
	$(BIN)/python demo/app.py $(if $(MODEL),--model $(MODEL))

# The folder of a Hugging Face Space: the page and a wheel of the package.
space: install
	rm -rf outputs/space && mkdir -p outputs/space
	cp demo/README.md demo/requirements.txt demo/*.py outputs/space
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir outputs/space .
	ls -l outputs/space

# The documentation as a site in site/, built without a network.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: quality kernel emulation
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m "not slow"

# With the long ones.
test-all: quality kernel emulation
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS)

style: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) dcnv3_kernel/build dist outputs .pytest_cache .ruff_cache
