"""How fast, and in how much memory, preference data is parsed, cleaned, split and mixed.

    python benchmarks/data_speed.py
    python benchmarks/data_speed.py --rows 50000 100000 200000

Reads nothing; writes made-up dialogues in HH's format, and the prepared rows, into a temporary folder that it removes.
Watch: rows a second of the first run, seconds of the second, the peak of the process's own memory, which should not
grow with the rows. "All" counts the pages of mapped files too. Each run is a process; its seconds include its imports.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench import measured, record

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "the a boat harbour lamp gull asks whether tomorrow rain comes and who mends nets for sailors in winter".split()
)


def write_dialogues(path: Path, rows: int):
    """Dialogues of one to four questions, about as long as HH's (median 1,500 characters a row, both sides)."""
    rng = random.Random(0)
    pool = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            turns = [f"\n\nHuman: {number} {rng.choice(pool)}"]
            for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
                turns += [f"\n\nAssistant: {rng.choice(pool)}", f"\n\nHuman: {rng.choice(pool)}"]
            prompt = "".join(turns)
            pair = {side: f"{prompt}\n\nAssistant: {rng.choice(pool)}" for side in ("chosen", "rejected")}
            file.write(json.dumps(pair) + "\n")


def measure(path: str):
    """Loads the file and prints seconds and megabytes as JSON; runs in a process of its own."""
    peak, start = [0], time.perf_counter()
    threading.Thread(target=watch_memory, args=(peak,), daemon=True).start()
    sys.path.insert(0, str(ROOT))
    from prepare_data import load_datasets

    train, evals, report = load_datasets(path, "preference")
    first = train[0]["prompt"][0]["content"]
    seconds = time.perf_counter() - start
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "resident": resident, "own": peak[0] / 1024, "first": first}))


def watch_memory(peak: list[int]):
    """Keeps the peak of the process's own memory (Linux; in KB): without the pages of mapped files, which the system
    takes back when it needs them."""
    while True:
        with open("/proc/self/status") as status:
            peak[0] = max(peak[0], *(int(line.split()[1]) for line in status if line.startswith("RssAnon")), 0)
        time.sleep(0.02)


def main(args):
    if args.measure:
        return measure(args.measure)
    print(f"{'':>18}{'first run':>36}{'second run':>36}")
    columns = f"{'seconds':>9}{'rows/s':>9}{'own MB':>9}{'all MB':>9}"
    print(f"{'rows':>9}{'file MB':>9}{columns}{columns}")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "dialogues.jsonl")
            write_dialogues(path, rows)
            environment = os.environ | {"HF_DATASETS_CACHE": str(Path(folder, "cache"))}
            runs = [measured([sys.executable, __file__, "--measure", path], env=environment) for _ in range(2)]
            assert runs[0]["first"] == runs[1]["first"]
            line = f"{rows:>9,}{path.stat().st_size / 2**20:>9.0f}"
            for run in runs:
                line += (
                    f"{run['seconds']:>9.2f}{rows / run['seconds']:>9,.0f}{run['own']:>9.0f}{run['resident']:>9.0f}"
                )
            print(line, flush=True)
            for name, run in zip(("first run", "second run"), runs, strict=True):
                what = f"data: {rows:,} rows, {name}"
                record(args.record, what, seconds=run["seconds"], peak=run["resident"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 100_000, 200_000], help="sizes to measure")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--record", help=argparse.SUPPRESS)
    main(parser.parse_args())
