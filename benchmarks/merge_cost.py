"""What a merge costs beside loading and saving the same model: seconds and peak memory, its verification apart.

    python benchmarks/merge_cost.py
    python benchmarks/merge_cost.py --repeats 5 --dtype bfloat16

Makes a random model of about 500 MB and an adapter on it in a temporary folder. Each measurement is a process of its
own, with everything imported before its clock starts; a table of medians is printed.

`load + save` never holds the weights: loading maps the file, and saving copies it. A merge has to make new ones, as
`load (weights read) + save` does, which copies each into memory of its own.

Peak memory is what the process holds beyond its imports: `peak RSS` counts the pages of the base's file that the
kernel shares and can drop at any time, `private` does not.
"""

import argparse
import gc
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench import make_tokenizer, measured, record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

LINES = ("load + save", "load (weights read) + save", "merge, without verification", "merge, as it is run")
MERGED = LINES[2:]


def make(folder: Path, dtype: str, megabytes: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    make_tokenizer(folder / "base")
    width, bytes_each = 1024, getattr(torch, dtype).itemsize
    layers = round((megabytes * 1e6 / bytes_each - 2 * 16000 * width) / (4 * width**2 + 3 * width * 2816))
    config = LlamaConfig(
        vocab_size=16000, hidden_size=width, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16
    )
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")


def memory() -> dict:
    """Megabytes that this process holds: all of its pages, and those that are its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = {key: value.split() for key, value in (line.split(":", 1) for line in lines)}
    return {"rss": int(status["VmRSS"][0]) / 1024, "private": int(status["RssAnon"][0]) / 1024}


def warm_memory(size: int = 3 << 30) -> None:
    """Use free memory once: in a virtual machine a page's first use costs several times a later one's.

    Otherwise the line that runs after one that has just freed its memory is the fast one.
    """
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def measure(line: str, folder: Path) -> None:
    """One measurement, printed as JSON: seconds, seconds of verification, and megabytes above the start."""
    import torch
    from peft import PeftModel  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import merge_peft_adapter
    import rlhf.models.loading  # noqa: F401  what the merge imports

    apart = [0.0]

    def timed(function, off):
        def wrapper(*args):
            start = time.perf_counter()
            result = off if line == MERGED[0] else function(*args)
            apart[0] += time.perf_counter() - start
            return result

        return wrapper

    # what proves the merge; off for the third line
    merge_peft_adapter.probe_logits = timed(merge_peft_adapter.probe_logits, torch.ones(1))
    merge_peft_adapter.prove = timed(merge_peft_adapter.prove, 0.0)
    gc.freeze()  # the libraries' own objects, which else are searched in the middle of a measurement
    warm_memory()
    start, peak, done = memory(), {"rss": 0, "private": 0}, threading.Event()

    def watch():
        while not done.wait(0.02):
            for key, value in memory().items():
                peak[key] = max(peak[key], value - start[key])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    clock = time.perf_counter()
    if line not in MERGED:
        dtype = AutoConfig.from_pretrained(folder / "base").dtype
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        if line == LINES[1]:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        model.to(dtype).save_pretrained(folder / "saved")
    else:
        flags = [f"--adapter_model_name={folder / 'adapter'}", f"--output_name={folder / 'saved'}"]
        merge_peft_adapter.main(merge_peft_adapter.make_parser().parse_args(flags))
    seconds = time.perf_counter() - clock
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "verification": apart[0], **peak}))


def main(args):
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make(Path(folder), args.dtype, args.megabytes)
        size = sum(path.stat().st_size for path in Path(folder, "base").glob("*.safetensors")) / 1e6
        print(f"a model of {size:.0f} MB in {args.dtype}, medians of {args.repeats}")
        print(f"{'':30s}{'seconds':>9s}{'of it verification':>20s}{'peak RSS MB':>13s}{'private MB':>12s}")
        runs = {line: [] for line in LINES}
        for _ in range(args.repeats):  # in turn, so that a busy machine is busy for all
            for line in LINES:
                shutil.rmtree(Path(folder, "saved"), ignore_errors=True)
                command = [sys.executable, __file__, "--measure", line, "--folder", folder]
                runs[line].append(measured(command))
        for line, results in runs.items():
            medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
            print(
                f"{line:30s}{medians['seconds']:9.2f}{medians['verification']:20.2f}"
                f"{medians['rss']:13.0f}{medians['private']:12.0f}"
            )
            ours = {key: statistics.median(result[key] for result in runs[LINES[-1]]) for key in medians}
            ratios = {"ratio": medians["seconds"] / ours["seconds"], "memory": ours["rss"] / medians["rss"]}
            record(args.record, f"merge: {line}", **ratios, seconds=medians["seconds"], peak=medians["rss"])


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="size of the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the stored model")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each line")
    parser.add_argument("--folder", help="where to work; by default the system's temporary folder")
    parser.add_argument("--measure", choices=LINES, help=argparse.SUPPRESS)
    parser.add_argument("--record", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    parsed = make_parser().parse_args()
    measure(parsed.measure, Path(parsed.folder)) if parsed.measure else main(parsed)
