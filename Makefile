# What there is to do; each target sets up what it needs in .venv, and takes seconds the next time.
PYTHON ?= python3
BIN := .venv/bin
export PROMPT

.PHONY: help demo test check docs sanitize cross hosts scale conformance families bench aot gpu clean

help: ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

demo: ## open a chat page with a small model; PROMPT="..." answers in the terminal instead
	@$(PYTHON) tools/set_up.py $(if $(PROMPT),demo,page)
	@if [ -n "$$PROMPT" ]; then $(BIN)/gptq-loader demo "$$PROMPT"; \
	else $(BIN)/gptq-loader demo $(if $(PORT),--port $(PORT)); fi

test: ## run the tests
	@$(PYTHON) tools/set_up.py test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

check: ## format, lint, types, layers, warnings of C++, workflows, commit messages
	@$(PYTHON) tools/set_up.py check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror kernels/csrc/*.cpp kernels/csrc/*.h tests/native/*.cpp
	$(BIN)/mypy
	$(BIN)/pyright
	PYTHONPATH=.:kernels:extensions $(BIN)/lint-imports
	$(BIN)/python -m pip check
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*_form.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/python tools/check_native.py
	$(BIN)/python tools/check_commits.py

docs: ## build the documentation site, build/site
	@$(PYTHON) tools/set_up.py docs
	@PYTHONPATH=.:kernels:extensions NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html"

sanitize: ## run the native library's tests by sanitizers of memory and of threads
	@$(PYTHON) tools/set_up.py test
	@$(PYTHON) tools/sanitize.py $(ARGS)

cross: ## build wheels for ARM, Windows and Macs, and run them by qemu and Wine; TARGETS="..."
	@$(PYTHON) tools/set_up.py cross
	@$(BIN)/python tools/cross.py $(TARGETS)

hosts: ## drive the real host programs; WEBUI_DIR is a checkout of text-generation-webui
	@$(PYTHON) tools/set_up.py hosts $(HOSTS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/hosts $(ARGS)

scale: ## drive the real vLLM and Ray Serve, some 15 minutes
	@GPTQ_SCALE=1 $(PYTHON) tools/set_up.py hosts vllm ray
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/scale $(ARGS)

conformance: ## hold every kernel that runs here against float64, and whole models against transformers
	@$(PYTHON) tools/set_up.py test
	@OMP_NUM_THREADS=1 $(BIN)/python -m gptq_loader_plugin.conformance --device cpu --jobs 2 \
		--kernel reference --kernel dense --kernel torch --kernel cpu --kernel cpu-int4 $(ARGS)
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m gptq_loader_plugin.conformance \
		--device cpu --jobs 2 --kernel triton --cells cover $(ARGS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m gptq_loader_plugin.conformance.models --kernel reference
	@OMP_NUM_THREADS=1 $(BIN)/python -m gptq_loader_plugin.conformance.models --kernel cpu
	@OMP_NUM_THREADS=1 $(BIN)/python -m gptq_loader_plugin.conformance.models --engine

families: ## load, decode and quantise a tiny model of every type transformers has; NAMES="llama ..."
	@$(PYTHON) tools/set_up.py test
	@$(BIN)/python tools/families.py $(NAMES) $(ARGS)

bench: ## measure: exactness, memory, the demo's speed, CPU kernels, and other programs by PEERS="--peer ..."
	@$(PYTHON) tools/set_up.py test
	@mkdir -p build
	@$(BIN)/python bench/exactness.py
	@$(BIN)/python bench/memory.py
	@$(BIN)/python bench/decode.py
	@$(BIN)/gptq-loader bench demo
	@$(BIN)/python bench/kernels.py --json build/kernels.json
	@for shape in SmolLM2-135M TinyLlama-1.1B; do \
		$(BIN)/python bench/peers.py $$shape --data build/bench $(PEERS) --json build/peers-$$shape.json; \
	done

aot: ## compile every Triton tile for every GPU, and gate the machine code
	@$(PYTHON) tools/set_up.py test
	@$(BIN)/python bench/triton_aot.py --table docs/kernels/triton.md
	@$(BIN)/python bench/triton_aot_fma.py --table docs/kernels/triton.md
	@$(BIN)/python bench/attention_aot.py --table docs/kernels/attention.md

gpu: ## prove and measure everything on this machine's GPU, in eight minutes; tiny without one
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu/run.py $(ARGS)

clean: ## forget .venv, .venvs and everything built
	rm -rf .venv .venvs build dist *.egg-info
