"""The benchmarks of speed, one after the other, and one table of what they found; `make bench` runs this.

    make bench                                       # an hour, on a machine that does nothing else
    python benchmarks/bench.py --only stages data_speed

The ratio comes first: how many times as fast ours is as what stands in the line (or as its other column says). Then
real tokens a second (padding does not count), seconds, the peak memory of the process (the kernel's own figure,
VmHWM), and the loss on held-out rows at equal tokens. Each comparison was made within one run, in turn, and shows
medians. Each benchmark also runs alone, and says in its own words what it does: see the top of each file. Two are not
of speed and only run alone: memory.py and ppo_quality.py.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {  # of the table: key in a record, title, format
    "ratio": ("ours is x as fast", ".2f"),
    "tokens": ("real tokens/s", ",.0f"),
    "seconds": ("seconds", ".3g"),
    "first": ("s to first step", ".1f"),
    "whole": ("s in all", ".1f"),
    "peak": ("peak MB", ",.0f"),
    "memory": ("ours takes x of it", ".2f"),
    "loss": ("held-out loss", ".4f"),
    "spread": ("+-", ".4f"),
}
SMALL = {"n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 8192, "n_positions": 256}
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
BENCHMARKS = {
    "stages": ["--shapes", "small", "124M", "--growth"],
    "data_speed": [],
    "mistakes": ["--repeats", "3"],
    "merge_cost": [],
    "ppo_speed": [],
}


def machine() -> str:
    """Processor, cores, memory and the versions of the libraries, in two lines."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = []
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    chip = names[0] if names else platform.processor() or platform.machine()
    return f"{chip}, {cores} cores, {memory:.0f} GB, Python {platform.python_version()}\n{', '.join(found)}"


def record(path: str | None, what: str, **cells) -> None:
    """Add a line to the file that the table is made of; nothing without a file."""
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"what": what, **cells}) + "\n")


def measured(command: list, **options) -> dict:
    """The JSON in the last line that a process prints; what it complains of is the end, if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def make_tokenizer(folder: Path, texts=("a b c",), size: int = 300) -> None:
    """A byte-level BPE like gpt2's."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, size, special_tokens=["<|endoftext|>"], show_progress=False)
    GPT2TokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)


def make_base_and_reward(folder: Path, config: dict):
    """A random GPT-2 in base/, and a random LoRA of a reward model on it in reward/; returns the latter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    make_tokenizer(folder / "base")
    GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "base")
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    judge = get_peft_model(judge, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **LORA))
    judge.save_pretrained(folder / "reward")
    return judge


def timed(trainer, clock) -> list[float]:
    """What the clock shows at each of a trainer's log lines; filled while it trains."""
    ends, log = [], trainer.log

    def timed_log(*args, **kwargs):
        ends.append(clock())
        return log(*args, **kwargs)

    trainer.log = timed_log
    return ends


def median_seconds(ends: list[float], updates: int) -> float:
    """Between the log lines of so many updates: of each but the first."""
    return statistics.median(b - a for a, b in zip(ends, ends[1:updates], strict=False))


def table(lines: list[dict]) -> str:
    """Markdown, with those columns that any line has."""
    shown = {key: column for key, column in COLUMNS.items() if any(line.get(key) is not None for line in lines)}
    texts = [["", *(title for title, _ in shown.values())]]
    for line in lines:
        cells = [format(line[key], form) if line.get(key) is not None else "" for key, (_, form) in shown.items()]
        texts.append([line["what"], *cells])
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    rows = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in texts)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(args):
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "records.jsonl")
        for name in args.only:
            flags = [*BENCHMARKS[name], *(["--rows", args.rows] if args.rows and name == "stages" else [])]
            print(f"\n{name} {' '.join(flags)}", flush=True)
            command = [sys.executable, Path(__file__).with_name(f"{name}.py"), *flags, "--record", found]
            failed += [name] if subprocess.run(command, cwd=ROOT).returncode else []
        lines = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    report = f"{machine()}\n\n{table(lines)}\n" + "".join(f"\n{name} FAILED: see above\n" for name in failed)
    print(f"\n{report}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(report)
    sys.exit(bool(failed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="which benchmarks")
    parser.add_argument("--rows", help="for stages.py: a file of pairs; without it, made-up text")
    parser.add_argument("--out", type=Path, help="write the table into this file too")
    main(parser.parse_args())
