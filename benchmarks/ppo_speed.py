"""Seconds an update and peak memory of PPO here and in TRL 1.12.0, the last release with a PPOTrainer, side by side.

    make bench-ppo                                   # builds .venv-trl with TRL 1.12.0 and runs this
    python benchmarks/ppo_speed.py --shapes tiny --repeats 5

Both train a LoRA of rank 16 on all linear layers of the same random GPT-2, with the same prompts, batch, answer
length, epochs and micro-batch, from the same reward model. TRL's critic and reward model are networks of their own
(the critic a LoRA too, the reward model merged); here they share the policy's base, and the critic is a LoRA or, in
"head", a head alone. Runs alternate, each in a process of its own; medians are reported, and beside them the time
that the matrix products of an update need at the rate at which this machine multiplies large matrices with the faster
of torch's two libraries.
"""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from bench import GPT2, LORA, SMALL, make_base_and_reward, measured, median_seconds, record, timed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

RUN = {"batch": 32, "response_length": 48, "epochs": 4, "updates": 6}
SHAPES = {
    "tiny": {"config": SMALL, "run": RUN},
    "uniform": {"config": SMALL, "run": {**RUN, "length": 16}},  # one length, the kindest case for whoever pads
    "124M": {"config": GPT2, "run": {"batch": 8, "response_length": 16, "epochs": 2, "updates": 4}},
}


def prompts(shape: dict) -> list[list[int]]:
    """Prompts of one length, or as skewed in length as people's are: a median of 16 tokens, cut at 64.

    The first questions of HH's helpful-online test set have a median of about 15 tokens, quartiles of 11 and 24, and
    one in twenty above 150; whoever pads pays for the longest of a batch.
    """
    import torch

    run, generator = shape["run"], torch.Generator().manual_seed(0)
    count = run["batch"] * run["updates"]
    lengths = torch.empty(count).log_normal_(2.77, 0.8, generator=generator).clamp(4, 64).long().tolist()
    lengths = [run["length"]] * count if "length" in run else lengths
    vocabulary = shape["config"]["vocab_size"]
    return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def settings(folder: Path, run: dict, micro: int) -> dict:
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": run["batch"] // micro,
        "num_ppo_epochs": run["epochs"],
        "response_length": run["response_length"],
        "total_episodes": run["batch"] * run["updates"],
        "num_mini_batches": 1,
        "local_rollout_forward_batch_size": run["batch"],
        "num_sample_generations": 0,
        "learning_rate": 1e-5,
        "temperature": 0.7,
        "kl_coef": 0.05,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def ours(folder: Path, shape: dict, micro: int, value_adapter: bool = True):
    from datasets import Dataset
    from peft import get_peft_model

    from rlhf.models.loading import load_policy, load_tokenizer
    from rlhf.models.rewards import load_reward
    from rlhf.ppo.config import PPOConfig
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.runs.arguments import ModelArguments

    run = shape["run"]
    model_args = ModelArguments(model_name_or_path=str(folder / "base"), lora_r=16, lora_alpha=32)
    tokenizer = load_tokenizer(str(folder / "base"))
    policy, peft_config = load_policy(model_args, tokenizer, 0)
    policy = get_peft_model(policy, peft_config)
    return PPOTrainer(
        model=policy,
        args=PPOConfig(**settings(folder, run, micro), eval_strategy="no", value_adapter=value_adapter),
        reward_model=load_reward(str(folder / "reward"), tokenizer, model_args, policy),
        train_dataset=Dataset.from_dict({"prompt_ids": prompts(shape)}),
        eval_dataset={},
        processing_class=tokenizer,
    )


def theirs(folder: Path, shape: dict, micro: int):
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    run = shape["run"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    tokenizer.pad_token = "b"
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    return PPOTrainer(
        args=PPOConfig(**settings(folder, run, micro), stop_token="eos", bf16=False),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "base"),
        ref_model=None,
        reward_model=AutoModelForSequenceClassification.from_pretrained(folder / "merged", num_labels=1),
        value_model=get_peft_model(critic, LoraConfig(task_type="SEQ_CLS", **LORA)),
        train_dataset=Dataset.from_dict({"input_ids": prompts(shape)}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )


def measure(who: str, folder: Path, shape: dict, micro: int) -> None:
    """One run; prints the median seconds of its updates after the first, and its peak memory."""
    trainer = {"ours": ours, "head": partial(ours, value_adapter=False), "trl": theirs}[who](folder, shape, micro)
    ends = timed(trainer, time.perf_counter)
    trainer.train()
    seconds = median_seconds(ends, shape["run"]["updates"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def floor(folder: Path, shape: dict, micro: int) -> None:
    """The matrix products of one update, counted as it runs, and the seconds that they take at this machine's rate."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

    from rlhf.models.fast_linear import product

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def linear_flop(x, weight, *args, out_shape, **kwargs):
        return 2 * math.prod(x) * out_shape[-1]

    trainer = ours(folder, {**shape, "run": {**shape["run"], "updates": 1}}, micro)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    width = shape["config"]["n_embd"]
    a, b = torch.randn(1024, width), torch.randn(4 * width, width)
    times = {torch.nn.functional.linear: [], product: []}
    for multiply in list(times) * 30:
        start = time.perf_counter()
        multiply(a, b)
        times[multiply].append(time.perf_counter() - start)
    rate = 2 * a.shape[0] * b.numel() / min(map(statistics.median, times.values()))
    print(json.dumps({"gflop": counter.get_total_flops() / 1e9, "gflops": rate / 1e9}))


def main(args):
    if args.measure:
        given = Path(args.folder), SHAPES[args.shapes[0]], args.micro
        return floor(*given) if args.measure == "floor" else measure(args.measure, *given)
    pythons = {"ours": sys.executable, "head": sys.executable, "trl": args.trl_python, "floor": sys.executable}
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            judge = make_base_and_reward(Path(folder), SHAPES[name]["config"])
            judge.merge_and_unload().save_pretrained(Path(folder, "merged"))
            micro = args.micro or SHAPES[name]["run"]["batch"]
            results = {"ours": [], "head": [], "trl": [], "floor": []}
            for who in [*["ours", "head", "trl"] * args.repeats, "floor"]:
                command = [pythons[who], __file__, "--measure", who, "--folder", folder, "--shapes", name]
                results[who].append(measured([*command, "--micro", micro], cwd=folder))
            print(f"\n{name}: {SHAPES[name]['run']}, micro-batch {micro}, {args.repeats} runs each, alternating")
            print(f"{'':12}{'s an update':>14}{'(all runs)':>30}{'peak MB':>10}")
            median = {}
            for who in ("trl", "ours", "head"):
                seconds = [result["seconds"] for result in results[who]]
                peak = statistics.median(result["peak"] for result in results[who])
                median[who] = statistics.median(seconds), peak
                runs = " ".join(f"{s:.2f}" for s in seconds)
                print(f"{who:12}{median[who][0]:14.3f}{runs:>30}{peak:10.0f}")
            for who, label in (("ours", "ours"), ("head", "ours, the critic a head alone"), ("trl", "trl 1.12")):
                ratios = {"ratio": median[who][0] / median["ours"][0], "memory": median["ours"][1] / median[who][1]}
                record(args.record, f"{name} ppo: {label}", **ratios, seconds=median[who][0], peak=median[who][1])
            needed, rate = (results["floor"][0][key] for key in ("gflop", "gflops"))
            for who, label in (("ours", "ours"), ("head", "with a head alone as its critic it")):
                times, memory = median["trl"][0] / median[who][0], median[who][1] / median["trl"][1]
                print(f"{label} is {times:.2f} x as fast with {memory:.2f} of the memory")
            print(
                f"{needed:.1f} GFLOP of matrix products at {rate:.0f} GFLOPS: {needed / rate:.2f} s;"
                f" ours takes {median['ours'][0] / (needed / rate):.2f} x that"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro", type=int, help="rows of a micro-batch; by default the whole batch")
    parser.add_argument("--trl_python", default=str(ROOT / ".venv-trl/bin/python"), help="a Python with TRL 1.12.0")
    parser.add_argument("--measure", choices=["ours", "head", "trl", "floor"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--record", help=argparse.SUPPRESS)
    main(parser.parse_args())
