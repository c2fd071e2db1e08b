"""SFT, reward modelling and DPO beside TRL's own command line and beside a bare PyTorch loop, in one run.

    python benchmarks/stages.py                                  # the small shape
    python benchmarks/stages.py --shapes small 124M --rows pairs.jsonl.gz
    python benchmarks/stages.py --stages sft --steps 60 --seeds 0 1 2 --verbose
    python benchmarks/stages.py --growth

Each side trains the same LoRA on the same random GPT-2, the same rows and as many steps; each run is a process of its
own, and the sides take turns, a turn for each seed. "trl" is `trl sft`, `trl reward` and `trl dpo` as installed, given
the flags that make it the same work and no others (--verbose prints all commands); "no ckpt" is that without
gradient checkpointing. One default is not left to it: its launcher would give it one thread (OMP_NUM_THREADS=1), here
it gets all cores; `--against ours trl one_thread` measures it as it comes, too.

"bare" is what a user would write who needs none of this (bare_loop.py): PEFT, AdamW, a loop; on rows padded to the
longest of a batch, or laid end to end, where only attention goes row by row, by a registered attention function.

Step times are the trainers' own (train_runtime), first step included; the time to the first step is taken from
outside, as is the peak memory: the kernel's ru_maxrss of a process or of the largest one that it started. Rows are
only those that fit --max_length whole. Each side shuffles by itself; each row is seen once. The held-out loss is
computed for all saved adapters by the same code, over the same rows, with its standard deviation over the seeds.
"""

import argparse
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import GPT2, SMALL, machine, make_tokenizer, record, table

ROOT = Path(__file__).resolve().parent.parent
LOOP = ROOT / "benchmarks/bare_loop.py"
SHAPES = {  # with the steps, repeats and held-out rows that keep a default run short: minutes, a quarter of an hour
    "small": ({**SMALL, "n_positions": 512}, 12, 3, 64),
    "124M": (GPT2, 2, 1, 16),
}
STAGES = {  # our script, TRL's, the rows that it reads, learning rate
    "sft": ("sft_training", "sft", 2e-4),
    "reward": ("reward_modeling", "pairs", 1e-4),
    "dpo": ("dpo_training", "pairs", 5e-6),
}
SIDES = {
    "ours": "ours",
    "trl": "trl",
    "one_thread": "trl as it comes, one thread",
    "no_ckpt": "trl, no ckpt",
    "padded": "bare, padded",
    "unpadded": "bare, unpadded",
}
GROWTH = (1_000, 10_000, 100_000)  # rows
FIRST = re.compile(rb"'loss': |(it/s|s/it), loss ")  # the first step's loss, as TRL prints it or our bar shows it


def made_up(path: Path, rows: int) -> None:
    """Pairs as long as people's: 30 words asked and 45 answered in the median, log-normal, so one in ten has three
    times that. The words are made of syllables and used as unevenly as people use theirs (Zipf)."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvw" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(4000)]
    weights = [1 / rank for rank in range(3, 4003)]
    text = rng.choices(words, weights, k=200_000)

    def some(median, sigma):
        count = min(400, max(3, round(rng.lognormvariate(0, sigma) * median)))
        start = rng.randrange(len(text) - count)
        return " ".join(text[start : start + count])

    with open(path, "w") as file:
        for i in range(rows):
            pair = {"prompt": f"{i} {some(30, 0.9)}", "chosen": some(45, 0.8), "rejected": some(45, 0.8)}
            file.write(json.dumps(pair) + "\n")


def prepare(folder: Path, config: dict, rows: Path, args) -> None:
    """The base with tokenizer and template, the rows as both sides read them, their tokens for the bare loop."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sys.path.insert(0, str(ROOT))
    from prepare_data import load_datasets
    from rlhf.models.loading import load_tokenizer
    from rlhf.models.rendering import Unrenderable, encode_preference

    found, _, _ = load_datasets(str(rows), "preference", validation_split_percentage=0, seed=0)
    texts = ("\n".join(m["content"] for side in row if side != "dataset" for m in row[side]) for row in found)
    make_tokenizer(folder / "base", texts, config["vocab_size"])
    tokenizer = load_tokenizer(str(folder / "base"))
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": tokenizer.pad_token_id}
    GPT2LMHeadModel(GPT2Config(**config, **ids)).save_pretrained(folder / "base")

    fitting, short = {}, 0  # one row a prompt, so that none of the held-out ones is known
    for row in found:
        try:
            tokens = encode_preference(row, tokenizer, max_length=args.max_length)
        except Unrenderable:
            tokens = {"shortened": True}
        if tokens["shortened"]:
            short += 1
        elif len(row["chosen"]) == len(row["rejected"]) == 1:
            fitting.setdefault(json.dumps(row["prompt"]), (row, tokens))
    count = args.batch * args.steps
    fitting = list(fitting.values())[: count + args.held_out]
    if len(fitting) < count + args.held_out:
        sys.exit(f"{len(fitting)} usable rows of {count} + {args.held_out} ({short} are longer than --max_length)")
    for kind, columns in (("sft", {"prompt": "prompt", "completion": "chosen"}), ("pairs", {})):
        columns = columns or {side: side for side in ("prompt", "chosen", "rejected")}
        (folder / kind).mkdir()
        for split, part in (("train", fitting[:count]), ("test", fitting[count:])):
            lines = [json.dumps({new: row[old] for new, old in columns.items()}) for row, _ in part]
            (folder / kind / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for _, row in fitting]
    (folder / "tokens.json").write_text(json.dumps({"train": rows[:count], "test": rows[count:]}))


def command_of(folder: Path, stage: str, side: str, out: Path, seed: int, args) -> list[str]:
    """What is typed for a side: both trainers get the same flags, but for the names of two."""
    script, rows, rate = STAGES[stage]
    if side in ("padded", "unpadded"):
        settings = {"steps": args.steps, "batch": args.batch, "rate": rate, "seed": seed, "out": out}
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [sys.executable, LOOP, folder, stage, side, *words]
    flags = {
        "model_name_or_path": folder / "base", "output_dir": out, "max_steps": args.steps, "learning_rate": rate,
        "per_device_train_batch_size": args.batch, "max_length": args.max_length, "seed": seed, "use_cpu": "true",
        "bf16": "false", "use_peft": "true", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
        "lora_target_modules": "all-linear", "eval_strategy": "no", "save_strategy": "no", "report_to": "none",
        "logging_first_step": "true", "logging_steps": args.steps,
    }  # fmt: skip
    if side == "ours":
        start, flags["dataset_names"] = [sys.executable, ROOT / f"{script}.py"], folder / rows
    else:
        start, flags["dataset_name"] = [Path(sys.executable).with_name("trl"), stage], folder / rows
        flags |= {"num_cpu_threads_per_process": len(os.sched_getaffinity(0))} if side != "one_thread" else {}
        flags |= {"lora_task_type": "SEQ_CLS"} if stage == "reward" else {}
        flags |= {"gradient_checkpointing": "false"} if side == "no_ckpt" else {}
    return [*start, *(word for name, value in flags.items() for word in (f"--{name}", value))]


def watched(command: list, folder: Path) -> tuple[str, dict]:
    """Runs it: what it wrote, its seconds to the first step and in all, its peak memory in MB."""
    command = [str(word) for word in command]
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    start, first, text = time.perf_counter(), None, b""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=folder)
    while piece := os.read(process.stdout.fileno(), 1 << 16):
        text += piece
        if first is None and FIRST.search(text):
            first = time.perf_counter() - start
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{shlex.join(command)}\n{text.decode()[-3000:]}")
    return text.decode(), {"first": first, "whole": time.perf_counter() - start, "peak": usage.ru_maxrss / 1024}


def measure(shape: str, stage: str, folder: Path, tokens: int, args) -> list[dict]:
    """All runs of a stage, and the table's lines of their medians."""
    runs, outs = {side: [] for side in args.against}, []
    for seed in args.seeds:
        for side in args.against:
            out = folder / f"{stage}_{side}_{seed}"
            command = command_of(folder, stage, side, out, seed, args)
            if args.verbose:
                print(shlex.join(map(str, command)), flush=True)
            text, found = watched(command, folder)
            log = out / "training_log.jsonl"
            text = log.read_text() if log.exists() else text
            counted = re.findall(r"num_tokens\W+([\d.e+]+)", text)
            if side not in ("padded", "unpadded") and abs(float((counted or [0])[-1]) / tokens - 1) > 0.01:
                print(f"{shape} {stage} {side}: its log has {counted[-1:]} tokens, not {tokens}", flush=True)
            found["train"] = float(re.findall(r"train_runtime\W+([\d.e+]+)", text)[-1])
            print(f"{shape} {stage} {SIDES[side]}: {json.dumps(found)}", flush=True)
            runs[side].append(found)
            outs.append(out)
    evaluation = [sys.executable, LOOP, folder, stage, "held_out", "--batch", args.batch, "--adapters", *outs]
    text, _ = watched(evaluation, folder)
    losses = json.loads(text.splitlines()[-1])
    lines, ours = [], None
    for i, (side, found) in enumerate(runs.items()):
        median = {key: statistics.median(run[key] for run in found) for key in ("first", "peak", "train", "whole")}
        ours, mine = ours or median, losses[i :: len(runs)]
        lines.append(
            {
                "what": f"{shape} {stage}: {SIDES[side]}",
                "ratio": median["train"] / ours["train"],
                "tokens": tokens / median["train"],
                "seconds": median["train"] / args.steps,
                "first": median["first"],
                "whole": median["whole"],
                "peak": median["peak"],
                "memory": ours["peak"] / median["peak"],
                "loss": statistics.mean(mine),
                "spread": statistics.stdev(mine) if len(mine) > 1 else None,
            }
        )
    return lines


def growth(folder: Path, args) -> list[dict]:
    """Our SFT on more and more rows, as many steps of each: five times a comparison's, as the rows drawn differ."""
    lines, args = [], argparse.Namespace(**vars(args) | {"steps": 5 * args.steps})
    for count in GROWTH:
        made_up(folder / f"{count}.jsonl", count)
        out = folder / f"growth_{count}"
        command = command_of(folder, "sft", "ours", out, 0, args)
        command[command.index("--dataset_names") + 1] = folder / f"{count}.jsonl"
        command += ["--max_bad_percentage", 100]  # to a tokenizer of other rows, many of these are too long
        _, found = watched(command, folder)
        entries = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
        tokens = max(entry.get("num_tokens", 0) for entry in entries)
        seconds = max(entry.get("train_runtime", 0) for entry in entries)
        line = {"tokens": tokens / seconds, "seconds": seconds / args.steps, **found}
        line["ratio"] = line["tokens"] / lines[0]["tokens"] if lines else 1.0
        line["memory"] = line["peak"] / lines[0]["peak"] if lines else 1.0
        lines.append({"what": f"growth, sft: {count:,} rows over {GROWTH[0]:,}", **line})
    return lines


def main(args):
    if args.prepare:
        shape, folder, rows = args.prepare
        return prepare(Path(folder), SHAPES[shape][0], Path(rows), args)
    print(machine(), flush=True)
    lines, asked = [], (args.steps, args.repeats, args.held_out, args.seeds)
    for shape in args.shapes:
        args.steps, repeats, args.held_out = (a or b for a, b in zip(asked, SHAPES[shape][1:], strict=False))
        args.seeds = asked[-1] or list(range(repeats))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if not args.rows:
                made_up(folder / "made_up.jsonl", 3 * (args.batch * args.steps + args.held_out))
            rows = args.rows.resolve() if args.rows else folder / "made_up.jsonl"
            options = ["max_length", "batch", "steps", "held_out"]
            options = [word for name in options for word in (f"--{name}", getattr(args, name))]
            watched([sys.executable, __file__, "--prepare", shape, folder, rows, *options], folder)
            if args.growth and shape == args.shapes[0]:
                lines += growth(folder, args)
            data = json.loads((folder / "tokens.json").read_text())["train"]
            for stage in args.stages:
                sides = (1,) if stage == "sft" else (1, 2)
                tokens = sum(len(row[0]) + len(row[side]) for row in data for side in sides)
                print(f"{shape} {stage}: {args.steps} steps of {args.batch} rows, {tokens:,} tokens", flush=True)
                lines += measure(shape, stage, folder, tokens, args)
    for line in lines:
        record(args.record, **line)
    print(f"\n{machine()}\n\n{table(lines)}")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["small"])
    add("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    add(
        "--against",
        nargs="+",
        choices=SIDES,
        default=[side for side in SIDES if side != "one_thread"],
        help="the sides; the first is the one compared",
    )
    add("--rows", type=Path, help="pairs that --dataset_names could name, as a file; without it, made-up text")
    add("--steps", type=int, help="of each run (small 12, 124M 2)")
    add("--repeats", type=int, help="runs of each side, of other seeds (small 3, 124M 1)")
    add("--seeds", type=int, nargs="+", help="these seeds; by default 0, 1, 2...")
    add("--batch", type=int, default=8, help="rows of a step (8)")
    add("--max_length", type=int, default=256, help="longer rows are left out (256)")
    add("--held_out", type=int, help="rows that the loss is computed on at the end (small 64, 124M 16)")
    add("--growth", action="store_true", help="also our SFT on 1,000, 10,000 and 100,000 rows")
    add("--verbose", action="store_true", help="print all commands")
    add("--record", help=argparse.SUPPRESS)
    add("--prepare", nargs=3, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
