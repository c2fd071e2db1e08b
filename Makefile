# `make demo` and `make test` do all set-up on a fresh clone: a virtual environment in .venv, the install, then their job.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
OUT ?= saved/bench.md

.PHONY: demo test test-slow test-resume test-engines bench bench-ppo flags lint format clean

demo: .venv/ready
	$(BIN)/python examples/demo.py --seed $(SEED)

# a process a core, each on one thread
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# minutes: merges and runs killed at many moments, full disks
test-slow: .venv/ready
	$(BIN)/python -m pytest tests/slow

# of these: runs of all four trainers killed, damaged and stopped, with their tables
test-resume: .venv/ready
	$(BIN)/python -m pytest -s tests/slow/test_resume.py

# and those of FSDP2 and DeepSpeed on two processes of this CPU, in an environment that has DeepSpeed
test-engines: .venv-extra/ready
	.venv-extra/bin/python -m pytest -s tests/slow/test_engines.py

# an hour, on a machine that does nothing else: benchmarks of speed beside what others have, and one table in OUT;
# ROWS=pairs.jsonl.gz for real rows in place of made-up ones
bench: .venv/ready .venv-trl/ready
	$(BIN)/python benchmarks/bench.py --out $(OUT) $(if $(ROWS),--rows $(ROWS))

# a quarter of an hour: speed and memory of PPO beside TRL 1.12.0's, in a virtual environment of its own
bench-ppo: .venv/ready .venv-trl/ready
	$(BIN)/python benchmarks/ppo_speed.py

# after a change of our flags or a bump of the libraries: what --help and the checks of flags know
flags: .venv/ready
	$(BIN)/python -m rlhf.runs.description sft_training reward_modeling dpo_training ppo_training

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# removes what a later `make` builds again, not your runs in saved/
clean:
	rm -rf .venv .venv-extra .venv-trl .pytest_cache .ruff_cache .hypothesis

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

.venv-extra/ready: requirements.txt requirements-dev.txt requirements-extra.txt
	$(PYTHON) -m venv .venv-extra
	.venv-extra/bin/python -m pip install --quiet --requirement requirements-dev.txt --requirement requirements-extra.txt
	touch $@

# the last TRL with a PPOTrainer, on the versions of the other libraries that are used here
.venv-trl/ready: .venv/ready
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet trl==1.12.0 rich \
		$$($(BIN)/python -m pip freeze | grep -E '^(torch|transformers|peft|accelerate|datasets)==' | cut -d+ -f1)
	touch $@
