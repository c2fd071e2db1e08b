"""Flags, YAML files, mistakes, and every command that is written down: `pytest tests/runs/test_command_line.py`."""

import ast
import gzip
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.runs import description
from rlhf.user_error import UserError
from tests.conftest import ROOT, run_script

STAGES = ("sft_training", "reward_modeling", "dpo_training", "ppo_training")


def parse(*flags, script="sft_training"):
    return importlib.import_module(script).make_parser().parse_args_and_config(list(flags))


REQUIRED = ("--model_name_or_path=m", "--output_dir=o")


def test_lora_is_on_unless_said_otherwise_and_a_single_layer_name_stays_a_name():
    assert parse(*REQUIRED)[2].use_peft and parse(*REQUIRED)[2].lora_target_modules == "all-linear"
    assert not parse(*REQUIRED, "--no_use_peft")[2].use_peft
    assert parse(*REQUIRED, "--lora_target_modules", "c_attn")[2].lora_target_modules == ["c_attn"]


def test_yaml_files_are_read_left_to_right_and_flags_win(tmp_path):
    settings = "learning_rate: 2e-5\nmax_steps: 5\nuse_peft: false\nlora_target_modules: [x, y]\n"
    (tmp_path / "a.yaml").write_text(settings)
    (tmp_path / "b.yaml").write_text("max_steps: 6\nseed: 3\n")
    files = f"{tmp_path / 'a.yaml'} {tmp_path / 'b.yaml'}".split()
    _, training, model = parse(*REQUIRED, "--config", *files, "--seed", "4")
    assert (training.learning_rate, training.max_steps, training.seed) == (2e-5, 6, 4)
    assert not model.use_peft and model.lora_target_modules == ["x", "y"]


def test_a_folder_typed_with_a_slash_at_its_end_is_the_same_folder():
    """Else what to type next would be `saved/sft/_reward`, inside of it, which is refused."""
    assert parse("--model_name_or_path=m", "--output_dir=saved/sft/")[1].output_dir == "saved/sft"


def test_the_best_model_needs_no_word_on_when_to_save():
    best = ("--load_best_model_at_end", "--metric_for_best_model", "eval_rouge_avg")
    assert parse(*REQUIRED, *best)[1].save_strategy == "best"
    assert parse(*REQUIRED, *best, "--save_strategy", "epoch")[1].save_strategy == "epoch"
    steps = ("--eval_strategy", "steps", "--eval_steps", "5", "--save_steps", "5")
    assert parse(*REQUIRED, *best, *steps)[1].save_strategy == "steps"
    assert parse(*REQUIRED, "--load_best_model_at_end", "false")[1].save_strategy != "best"
    with pytest.raises(UserError, match="nothing is best with --eval_strategy no"):
        parse(*REQUIRED, *best, "--eval_strategy", "no")


def test_names_are_checked_without_the_columns_to_do_without(tmp_path):
    (tmp_path / "asks.jsonl").write_text('{"prompt": "Late?", "antwort": "No."}\n')
    names, ignored = f"--dataset_names={tmp_path / 'asks.jsonl'}", "--ignore_columns=antwort"
    flags = [names, f"--output_dir={tmp_path / 'out'}", "--model_name_or_path=m", "--reward_model_name_or_path=m"]
    evaluate = importlib.import_module("evaluate_model")
    for check in (
        importlib.import_module("ppo_training").make_parser().read,
        lambda args: evaluate.check(evaluate.make_parser().parse_args(args)),
    ):
        with pytest.raises(UserError, match="fit no known layout"):
            check(flags)
        check([*flags, ignored])


def test_the_tokenizer_is_not_changed_by_a_flag():
    with pytest.raises(UserError, match="--eos_token: a model keeps its tokenizer"):
        parse(*REQUIRED, "--eos_token", "a")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--learning_rat", "1"], "did you mean learning_rate?"),
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--dtype", "int3"], "--dtype: invalid choice"),
        (["--warmup_ratio", "0.1"], "--warmup_steps 0.1"),
        (["--load_in_4bit", "--load_in_8bit"], "8 bit and 4 bit"),
        (["--dtype", "bfloat16", "--no_use_peft"], "leave --dtype out; --bf16 computes in bfloat16"),
        (["--report_to", "tensorbored"], "did you mean tensorboard?"),
    ],
)
def test_wrong_flags_say_what_to_type(flags, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse(*REQUIRED, *flags)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("lora_aplha: 5", "did you mean lora_alpha?"),
        ("dtype: int3", "invalid choice"),
        ("- a", "flag: value"),
        ("a: [", "yaml"),
    ],
)
def test_wrong_yaml_says_where_and_what(tmp_path, yaml, says):
    (tmp_path / "run.yaml").write_text(yaml)
    with pytest.raises(UserError, match=re.escape(says)):
        parse(*REQUIRED, "--config", str(tmp_path / "run.yaml"))


@pytest.fixture(scope="module")
def wrong(base, data, tmp_path_factory):
    """Five mistakes that every newcomer makes once: flags, and what the message must hold."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty.jsonl").touch()
    good = {"model_name_or_path": base, "dataset_names": data, "output_dir": folder / "out"}
    return {
        "unknown dataset": (good | {"dataset_names": "ucc"}, "uc"),
        "missing file": (good | {"dataset_names": "nowhere.jsonl"}, "nowhere.jsonl"),
        "empty file": (good | {"dataset_names": folder / "empty.jsonl"}, "empty.jsonl"),
        "missing model": (good | {"model_name_or_path": "./nowhere"}, "./nowhere"),
        "typo": (good | {"datset_names": data}, "dataset_names"),
    }


@pytest.mark.parametrize("mistake", ["unknown dataset", "missing file", "empty file", "missing model", "typo"])
def test_a_mistake_is_explained_in_three_lines_before_anything_is_written(wrong, mistake):
    flags, says = wrong[mistake]
    with pytest.raises(UserError) as error:
        run_script("sft_training", **flags)
    message = str(error.value)
    assert says in message and 1 <= len(message.splitlines()) <= 3, message
    assert not flags["output_dir"].exists()


def test_a_mistake_ends_a_script_with_exit_code_2_and_no_traceback(wrong):
    command = [sys.executable, ROOT / "sft_training.py", *(f"--{k}={v}" for k, v in wrong["empty file"][0].items())]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert [line for line in process.stderr.splitlines() if line.startswith("error: ")], process.stderr


@pytest.mark.parametrize("script", ["merge_peft_adapter.py", "prepare_data.py", "evaluate_model.py"])
def test_tools_print_their_help_without_loading_a_library(script):
    code = f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
    code += f"try: runpy.run_path('{script}', run_name='__main__')\n"
    code += "except SystemExit: print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout.splitlines()[-1] == "[]", process.stdout + process.stderr


# Everything that is written down must be true -----------------------------------------------------------------------


PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
PAIR = {"prompt": "Is it late?", "chosen": "Not yet.", "rejected": "Yes."}
ROWS = {  # by a part of the file's name, where it is not a pair
    "votes": {"prompt": "Is it late?", "left": "Not yet.", "right": "Yes.", "vote": "left"},
    "trees": {"prompt": {"role": "prompter", "text": "Is it late?", "replies": []}},
}
DATA_FILE = re.compile(r"[\w/.-]+\.(?:jsonl|json|csv|parquet)(?:\.gz)?")


def text_of(page) -> str:
    """What a page says of ours: the first column of a table in coming-from.md is another system's."""
    text = page.read_text()
    return re.sub(r"^\|.*?[^\\]\|", "", text, flags=re.MULTILINE) if page.name == "coming-from.md" else text


def written_commands():
    """Each command of ours in README, pages, docstrings and YAML headers, with the place where it stands."""
    examples = [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/*.sbatch")]
    for path in [*PAGES, *ROOT.glob("*.py"), *ROOT.glob("*config*/*.yaml"), *examples]:
        text = text_of(path).replace("\\\n", " ")
        if path.suffix == ".py":
            text = (ast.get_docstring(ast.parse(path.read_text())) or "").replace("\\\n", " ")
        for line in text.splitlines():
            words = line.strip().lstrip("#$ ").split("  #")[0]
            for command in (words, *re.findall(r"`([^`]+)`", line)):
                if re.match(r"(accelerate launch|torchrun|python|sbatch) (?!-m).*\.py", command):
                    yield f"{path.name}: {command}", command


COMMANDS = dict(written_commands())


@pytest.mark.parametrize("where", COMMANDS)
def test_every_written_command_parses(where, monkeypatch, tmp_path):
    for name in ("configs", "accelerate_config", "examples", "benchmarks", *(p.name for p in ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_rewards.py").touch()  # the user's own
    monkeypatch.chdir(tmp_path)
    words = shlex.split(COMMANDS[where])
    said = " ".join([*words, *(Path(word).read_text() for word in words if re.match(r"configs/.*\.yaml", word))])
    for name in set(DATA_FILE.findall(said)):  # the user's own, too
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        row = next((row for part, row in ROWS.items() if part in name), PAIR)
        with (gzip.open if name.endswith(".gz") else open)(name, "wt") as file:
            file.write(json.dumps(row))
    for name in re.findall(r"model_name_or_path[=: ]+\W?(saved/\w+)", said):  # made by an earlier command
        Path(name).mkdir(parents=True, exist_ok=True)
    *launcher, at = (i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = Path(words[at]), words[at + 1 :]
    assert script.exists(), f"{script} does not exist"
    for i in launcher:
        importlib.import_module(f"examples.{Path(words[i]).stem}").make_parser().parse_args(words[i + 1 : at])
    for word in words[:at] if "--config_file" in words[:at] else []:
        assert not word.endswith(".yaml") or Path(word).exists(), word
    if script.stem in STAGES:
        parse(*flags, script=script.stem)
    elif script.parent == Path("."):
        parser = importlib.import_module(script.stem).make_parser()
        parser.parse_args(flags)


def test_the_readme_has_the_five_commands():
    assert sum("README.md" in where and "saved/" in where for where in COMMANDS) >= 5


def test_every_yaml_of_ours_is_a_whole_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no `saved` is, as after `make demo`, that lacks the models before
    for stage, name in zip(STAGES, ("sft", "reward", "dpo", "ppo"), strict=True):
        parse("--config", str(ROOT / "configs" / f"{name}.yaml"), script=stage)


OTHERS_FLAGS = set("config_file num_processes machine_rank main_process_ip main_process_port cpu nodes".split())
OTHERS_FLAGS |= set("config help help_all table".split())  # accelerate's, Slurm's, any script's, a benchmark's


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_on_a_page_exists(page):
    known = set(OTHERS_FLAGS)
    for stage in STAGES:
        flags = description.read(stage)[0]
        known |= {*flags, *(f"no_{name}" for name, flag in flags.items() if flag.get("no"))}
    for tool in ("merge_peft_adapter", "prepare_data", "evaluate_model", "examples.launch_ray"):
        known |= {name.lstrip("-") for name in importlib.import_module(tool).make_parser()._option_string_actions}
    assert not set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text_of(page))) - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_on_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert target.startswith("https://") or file.exists(), target
        titles = [re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in
                  (file.read_text().splitlines() if heading else ()) if line.startswith("#")]  # fmt: skip
        assert not heading or heading in titles, target


SKELETON = (
    "find_resume(", "load_tokenizer(", "load_datasets(", "tokenize_all(", "describe(", "watch(", "plan(", "dry_run",
    "trainer.train(", "trainer.save_model(", "finish(", "def make_parser", "run(main, make_parser)",
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_the_training_scripts_share_one_skeleton(stage):
    """Whoever has read one has read four: the same calls in the same order."""
    text = (ROOT / f"{stage}.py").read_text()
    assert f"accelerate launch {stage}.py" in ast.get_docstring(ast.parse(text))
    body = text[text.index("def main(") :]
    places = [body.find(step) for step in SKELETON]
    assert -1 not in places and places == sorted(places), dict(zip(SKELETON, places, strict=True))
