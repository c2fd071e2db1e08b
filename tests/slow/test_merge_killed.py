"""A merge that is killed, or runs out of disk, leaves its output absent or complete: `make test-slow`."""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from merge_peft_adapter import main, make_parser
from rlhf.models.fingerprints import weights_sha256
from tests.conftest import ROOT, make_tokenizer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter on a random model of 80 MB, so that there is time to kill its merge."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer(folder / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder / "adapter"


def merge(adapter, output, *flags):
    torch.set_num_threads(1)  # a fork has no thread pool
    main(make_parser().parse_args([f"--adapter_model_name={adapter}", f"--output_name={output}", *flags]))


def killed_after(seconds, *arguments):
    """The exit code of a merge in a process that is killed so many seconds after its start."""
    process = multiprocessing.get_context("fork").Process(target=merge, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_a_killed_merge_leaves_its_output_absent_or_complete(adapter, tmp_path, flags):
    torch.set_num_threads(1)
    merge(adapter, tmp_path / "whole")
    whole, output = weights_sha256(str(tmp_path / "whole")), tmp_path / "merged"
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    start = time.time()
    assert killed_after(60, adapter, tmp_path / "timed") == 0
    seconds = time.time() - start
    rng, outcomes, leftovers = random.Random(0), [], 0
    for i in range(20):
        if flags and not output.exists():
            merge(adapter, output)
        code = killed_after(seconds * (i + rng.random()) / 18, adapter, output, *flags)
        outcomes.append((code, output.exists()))
        leftovers += len(list(tmp_path.glob(".merged.merging-*")))
        if output.exists():
            assert sorted(path.name for path in output.iterdir()) == files and weights_sha256(str(output)) == whole
            if not flags:
                output.rename(tmp_path / f"complete-{i}")
    print(f"one merge {seconds:.1f} s; (exit code, output there) {outcomes}; hidden folders seen {leftovers}")
    assert sum(code == -9 for code, _ in outcomes) >= 10 and leftovers
    merge(adapter, output, "--overwrite")
    assert not list(tmp_path.glob(".merged.merging-*"))


def run(prefix, adapter, output):
    command = f"{prefix} exec {sys.executable} merge_peft_adapter.py"
    command += f" --adapter_model_name={adapter} --output_name={output}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)


def test_a_file_size_limit_ends_with_exit_code_2_and_nothing_left(adapter, tmp_path):
    process = run("ulimit -f 20000;", adapter, tmp_path / "merged")
    assert process.returncode == 2 and process.stderr.startswith("error: cannot write"), process.stderr
    assert "Traceback" not in process.stderr and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("options", ["size=20m", "size=200m,ro"], ids=["full", "read-only"])
def test_a_full_or_read_only_disk_ends_with_exit_code_2_and_nothing_left(adapter, tmp_path, options):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path]).returncode:
        pytest.skip("no mounts here")
    try:
        process = run("", adapter, tmp_path / "saved" / "merged")
        assert process.returncode == 2 and process.stderr.startswith("error: "), process.stderr
        assert (
            "cannot write" in process.stderr
            and "Traceback" not in process.stderr
            and not list(Path(tmp_path).iterdir())
        )
    finally:
        subprocess.run(["umount", tmp_path], check=True)
