"""Tiny models and tokenizers, made here: no test needs a network, a GPU or an account."""

import os
import socket
import subprocess
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = [
    "Where is the harbour? Down the hill, past the bakery and the old clock.",
    "Who mends nets? The three sisters do, and they sing while they work.",
    "Is it raining again? Yes, and the gulls are laughing at us.",
    "How far is the lighthouse? Ten minutes, if the wind is kind.",
]


def make_tokenizer(folder, vocab_size=400):
    """A byte-level BPE like gpt2's: one special token, no pad token, no chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = GPT2TokenizerFast(tokenizer_object=bpe._tokenizer)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a random GPT-2 of two layers, as it would come from the hub."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=eos,
        eos_token_id=eos,
        initializer_range=0.2,  # so that its logits can move
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of preference pairs in the field's plain columns; longer answers are better."""
    import json

    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with path.open("w") as file:
        for i in range(48):
            question, answer = SENTENCES[i % 4].split("? ")
            row = {"prompt": f"{question}, number {i}?", "chosen": answer, "rejected": answer.split()[0] + "."}
            file.write(json.dumps(row) + "\n")
    return str(path)


QUICK = (
    "--max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 --logging_steps 1 --report_to none"
)


def run_script(script, **flags):
    """A training script's main, in this process, with a few quick steps; returns its output folder."""
    import importlib

    module = importlib.import_module(script)
    arguments = [*QUICK.split(), *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]
    module.main(*module.make_parser().parse_args_and_config(arguments))
    return flags["output_dir"]


def run_processes(script, flags_of: list[dict], seconds=180, folders=(), kill_after=None) -> list[tuple[int, str]]:
    """A script on as many processes as there are dicts of flags, as torchrun starts them: what each ends with and
    prints.

    Args:
        folders: one for each to run in.
        kill_after: a file; when it is there, the last process is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(flags_of))}
    shared["OMP_NUM_THREADS"] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, f"{ROOT / script}.py", *QUICK.split(), *(f"--{k}={v}" for k, v in flags.items())],
            env={**os.environ, **shared, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folders[rank] if folders else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, flags in enumerate(flags_of)
    ]
    try:
        while kill_after and not kill_after.exists() and all(process.poll() is None for process in processes):
            time.sleep(0.02)
        if kill_after:
            processes[-1].kill()
        printed = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


@pytest.fixture(scope="session")
def saved(base, data, tmp_path_factory):
    """The folders of one run of each stage on the tiny base: sft, reward, dpo, ppo."""
    root = tmp_path_factory.mktemp("saved")
    flags = {"dataset_names": data, "learning_rate": 1e-2}
    folders = {stage: str(root / stage) for stage in ("sft", "reward", "dpo", "ppo")}
    run_script("sft_training", model_name_or_path=base, output_dir=folders["sft"], **flags)
    run_script("reward_modeling", model_name_or_path=folders["sft"], output_dir=folders["reward"], **flags)
    run_script("dpo_training", model_name_or_path=folders["sft"], output_dir=folders["dpo"], **flags)
    run_script(
        "ppo_training",
        model_name_or_path=folders["sft"],
        reward_model_name_or_path=folders["reward"],
        output_dir=folders["ppo"],
        response_length=8,
        **flags,
    )
    return folders
