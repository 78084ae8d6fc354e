# make bench    measure and plot everything here, and train the reference transformers
# make test     the suite, but for what takes long (compilers, planted flaws): SLOW=1 for all of it, as
#               in CI; its kernels find every fresh tensor full of NaN
# make lint     ruff, clang-format, mypy
# make gpu      on a machine with a GPU: its tests, compute-sanitizer, its benchmark grid; in ten
#               minutes with the build, results in OUT=… or benchmarks/results
# make wheel    a manylinux wheel in dist, for the Python that runs it and every torch: it brings no
#               libgomp, for torch does. FUSEDATTN_CUDA_ARCHS="80;90a" adds CUDA C++ kernels, "none"
#               leaves them out where there is a GPU
# make format   let ruff and clang-format mend what they can
# make clean    remove builds and the environment
#
# Everything runs in .venv, made on the first call. With PYTHON=… that interpreter is used instead,
# as it is: only fusedattn itself is installed into it, and nothing is fetched.

NATIVE := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
BUILD := setup.py csrc/toolchain.py csrc/native_build.py

ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
BUILT := .venv/built
else
INSTALLED := build/installed-$(subst /,_,$(PYTHON))
BUILT := build/built-$(subst /,_,$(PYTHON))
endif

# Two files at a time where pytest-xdist is there; threads that wait leave the core to the others.
PARALLEL = $(if $(shell $(PYTHON) -c "import xdist" 2>&1),,-n 2 --dist loadfile)
PYTEST = OMP_WAIT_POLICY=passive $(PYTHON) -m pytest $(PARALLEL)

TOOLS := $(if $(findstring /,$(PYTHON)),$(dir $(PYTHON)))
CLANG_FORMAT := $(TOOLS)clang-format

STARTED := $(shell date +%s)

.PHONY: bench test lint gpu wheel format clean
.DELETE_ON_ERROR:

bench: $(BUILT)
	$(PYTHON) -m fusedattn bench

test: $(BUILT)
	$(PYTHON) setup.py -q build_emulator
	$(PYTEST) tests --deterministic $(if $(SLOW),,-m "not slow")

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(if $(NATIVE),$(CLANG_FORMAT) --dry-run -Werror $(NATIVE))

format: $(INSTALLED)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(if $(NATIVE),$(CLANG_FORMAT) -i $(NATIVE))

gpu: $(BUILT)
	$(PYTHON) tests/on_gpu.py --started $(STARTED) --output $(or $(OUT),benchmarks/results)

# build/lib may hold what an earlier build put there and this one does not make.
wheel: $(INSTALLED)
	rm -rf build/lib build/lib.* build/wheel
	$(PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheel .
	PATH="$(if $(TOOLS),$(abspath $(TOOLS)):)$$PATH" $(PYTHON) -m auditwheel repair \
		--exclude libgomp.so.1 -w dist build/wheel/*.whl

clean:
	rm -rf build dist .venv python/*.egg-info python/fusedattn/*.so

# Torch comes first and under the constraints: an unpinned one can be gigabytes. The build's own
# requirements live in the environment, so that a rebuild finds the same headers and is incremental.
.venv/installed: pyproject.toml setup.py constraints.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -c constraints.txt torch setuptools pybind11 ninja
	$(PYTHON) -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,bench,dev]'
	touch $@

build/installed-%:
	mkdir -p build
	touch $@

$(BUILT): $(INSTALLED) $(NATIVE) $(BUILD) pyproject.toml
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@
