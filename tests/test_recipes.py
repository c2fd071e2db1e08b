"""Every file of configs/ is run, job by job, on rows of the genuine layouts: `pytest tests/test_recipes.py`."""

import gzip
import importlib
import json
import re
import uuid
from pathlib import Path

import datasets
import pytest
import yaml

from prepare_data import DATASETS
from rlhf.data.names import parse_names
from tests.conftest import ROOT

STAGE = {"sft": "sft_training", "reward": "reward_modeling", "dpo": "dpo_training", "ppo": "ppo_training"}
JOBS = {  # the files of a job in order, each stage from the folders of those before it
    "the pipeline": ["sft", "dpo"],
    "four sets": ["mix_sft", "reward", "ppo"],
    "summaries": ["tldr_sft", "tldr_reward", "tldr_ppo"],
    "HH files": ["hh_reward"],
    "trees": ["oasst_sft", "oasst_reward", "oasst_ppo"],
    "own files": ["files_sft", "files_reward", "files_ppo"],
    "Qwen": ["qwen_sft gpu_8gb", "qwen_dpo gpu_24gb", "qwen_sft gpu_80gb"],
}
QUICK = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_eval_samples": 2}
QUICK |= {"eval_on_start": False, "overwrite_output_dir": True, "validation_split_percentage": 30}
QUICK |= {"max_bad_percentage": 50}  # tests/samples has rows that are to be dropped


def sample(name: str, count: int, first: int = 0) -> list[dict]:
    """So many raw rows like those in tests/samples, each with a number of its own in all its texts."""
    raw = (ROOT / "tests" / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [numbered(json.loads(raw[i % len(raw)]), first + i // len(raw)) for i in range(count)]


def numbered(value, number: int):
    if isinstance(value, dict):
        return {key: numbered(inner, number) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbered(inner, number) for inner in value]
    return re.sub(r"(\w{3,}) ", rf"\g<1>{number} ", value, count=1) if isinstance(value, str) else value


def trees(count: int) -> list[dict]:
    """Message trees as Open Assistant exports them, replies within messages, of its flat messages."""
    found = []
    for i in range(count):
        nodes = {row["message_id"]: row | {"replies": []} for row in sample("oasst1", 11, i)}
        for node in nodes.values():
            if node["parent_id"] in nodes:
                nodes[node["parent_id"]]["replies"].append(node)
            elif node["parent_id"] is None:
                found.append({"message_tree_id": f"{i}", "tree_state": "ready_for_export", "prompt": node})
    return found


def without(rows: list[dict], *keys: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


def file_rows(path: Path) -> list[dict]:
    """Rows of the layout that a recipe's file has."""
    if path.parent.name.startswith("helpful"):
        return sample("hh", 8, first=10 * (path.name[:4] == "test") + 20 * len(path.parent.name))
    return {
        "oasst.trees.jsonl.gz": lambda: trees(8),
        "sft.jsonl": lambda: without(sample("dolly", 40), "category"),
        "pairs.jsonl": lambda: without(sample("rm_static", 40), "response"),
        "prompts.jsonl": lambda: without(sample("tldr", 40), "label"),
    }[path.name]()


def provide(names: str, patch) -> None:
    """What a recipe names: its files in this folder, and the hub's datasets from tests/samples."""
    for name in (parsed.name for parsed in parse_names(names)):
        if name in DATASETS:

            def stored(split, subset, name=name):
                yield from sample(name, 12, first=0 if split.startswith("train") else 10)

            patch.setitem(DATASETS, name, DATASETS[name]._replace(path=stored))
        else:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            with (gzip.open if name.endswith(".gz") else open)(name, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in file_rows(Path(name)))


@pytest.mark.parametrize("job", JOBS)
def test_a_recipe_runs_from_its_first_file_to_its_last(job, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("rlhf.runs.log.draw_curves", lambda *paths: None)  # these take longer than the runs
    monkeypatch.setattr("gc.collect", lambda *generation: 0)
    monkeypatch.setattr("datasets.fingerprint.Hasher.hash", lambda *values: uuid.uuid4().hex)
    for step in JOBS[job]:
        files = [ROOT / "configs" / f"{name}.yaml" for name in step.split()]
        recipe = {key: value for file in files for key, value in yaml.safe_load(file.read_text()).items()}
        for key in {"dataset_names", "eval_dataset_names"} & recipe.keys():
            recipe[key] = ",".join(recipe[key]) if isinstance(recipe[key], list) else recipe[key]
            provide(recipe[key], monkeypatch)
        script = STAGE[re.search("sft|reward|dpo|ppo", files[0].stem).group()]
        flags = QUICK | ({"eval_steps": 2} if "eval_steps" in recipe else {"save_strategy": "no"})
        if not recipe["model_name_or_path"].startswith("saved/"):
            flags |= {"model_name_or_path": base}
        short = {"num_mini_batches": 1, "num_ppo_epochs": 1, "response_length": 8, "total_episodes": 8}
        flags |= short if script == "ppo_training" else {"max_steps": 2}  # in the first step a warm-up moves nothing
        flags |= {"generate_eval_length": 8} if "generate_eval_length" in recipe else {}
        arguments = ["--config", *map(str, files), *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]
        module = importlib.import_module(script)
        module.main(*module.make_parser().parse_args_and_config(arguments))
        run = json.loads((Path(recipe["output_dir"]) / "run.json").read_text())
        assert run["data"]["tokenized"]["kept"] > 0
        assert recipe.get("metric_for_best_model", "eval") in str(run["metrics"])


def test_no_file_is_without_a_job():
    assert {path.stem for path in ROOT.glob("configs/*.yaml")} == set(" ".join(sum(JOBS.values(), [])).split())
