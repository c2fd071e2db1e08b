r"""See that it worked: models side by side on held-out prompts, or a reward model on held-out pairs.

    python evaluate_model.py --model_name_or_path=saved/gpt2_medium_ufb_dpo \
        --baseline=saved/gpt2_medium_uc_sft \
        --reward_model_name_or_path=saved/gpt2_large_uc_ufb_hh_shp_reward \
        --dataset_names=ufb --output_dir=saved/dpo_eval
    python evaluate_model.py \
        --reward_model_name_or_path=saved/gpt2_large_uc_ufb_hh_shp_reward \
        --dataset_names=ufb,hh --output_dir=saved/reward_eval
    python evaluate_model.py --model_name_or_path=saved/sft,saved/dpo \
        --reward_model_name_or_path=my_rewards.py:short --best_of=8 \
        --dataset_names=my_pairs.jsonl --output_dir=saved/best_of_8

Reads models (hub ids, model or adapter folders, several separated by commas), judges (reward models, or functions as
in `my_rewards.py:short`; the first picks the best of several samples) and the rows that training on the same names
holds out. Writes report.html, a page to read all answers on and to judge them yourself, report.md, report.json,
report.png and samples.csv; with --best_of pairs of the best and the worst sample. --dataset_names reads those, and the
votes that the page saves. Answers are kept as they come: Ctrl-C loses little, and the same command goes on.

Watch the intervals, not the means: at 200 prompts a win rate is known within 7 points. And read answers: a judge
that was trained on data like these is no judge of anything else.
"""

import re
import shlex
from itertools import product
from pathlib import Path

from rlhf.user_error import ToolParser, UserError, check_folder, missing_path, number, run_tool


def several(kind):
    """A type for argparse: numbers of this kind, separated by commas, as they were typed."""

    def read(text):
        for part in text.split(","):
            kind(part)
        return text

    read.__name__ = kind.__name__
    return read


def make_parser() -> ToolParser:
    parser = ToolParser(__doc__)
    add, whole, percent = parser.add_argument, number(int, 1), number(float, 0, 100)
    add("--model_name_or_path", help="models to evaluate, separated by commas: hub ids, model or adapter folders")
    add("--baseline", help="the model to compare them with: win rates against it, KL to it")
    add("--reward_model_name_or_path", help="judges: reward models or file.py:function, separated by commas")
    add("--dataset_names", help="evaluate on what training on these names holds out: uc, hh@helpful-base, file.jsonl")
    add("--eval_dataset_names", help="the same, but a file is taken whole")
    add("--votes", help="votes.jsonl of people, saved from report.html, separated by commas: they judge, too")
    add("--output_dir", required=True, help="folder of the report and of the answers so far")
    add("--best_of", type=whole, default=1, metavar="N", help="also take N samples a prompt and pick the judge's best")
    add("--response_length", type=whole, default=128, help="longest answer in tokens (128)")
    likeliest = "of the sampling; 0 takes the likeliest token (1); several, as in 0.7,1.0, each give a column"
    add("--temperature", type=several(number(float, 0, 100)), default="1", help=likeliest)
    add("--top_p", type=several(number(float, 0, 1)), help="draw of the fewest tokens that hold this probability (1)")
    add("--top_k", type=several(whole), help="draw of so many likeliest tokens (all)")
    add("--max_prompt_length", type=whole, help="longest prompt in tokens; longer ones lose their oldest turns first")
    add("--system_prompt", help="the models' system turn for rows that have none (the one each was trained with)")
    add("--max_eval_samples", type=whole, help="at most so many rows a dataset (200 prompts; 2000 pairs)")
    add("--validation_split_percentage", type=percent, default=5.0, help="as in training: prompts held out (5)")
    add("--max_bad_percentage", type=percent, default=5.0, help="stop above this share of broken rows (5)")
    add("--ignore_columns", help="as in training: columns to do without, separated by commas")
    add("--max_pairs_per_prompt", type=whole, help="as in training (all; 10 of a ranking)")
    add("--per_device_eval_batch_size", type=whole, default=32, help="rows at a time (32)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="decides the sampling (42)")
    return parser


def labels_of(names: list[str]) -> dict[str, str]:
    """{short label: name}: the last part of each name, or the whole where that would not tell them apart."""
    shorts = [name.rpartition(":")[2] if ".py:" in name else Path(name).name for name in names]
    return {
        short if shorts.count(short) == 1 and short != "data" else name: name
        for short, name in zip(shorts, names, strict=True)
    }


def split_names(text: str | None) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def names_of(args) -> dict[str, str]:
    """{short label: name} of the models, the baseline first unless it is among those asked for."""
    asked = split_names(args.model_name_or_path)
    return labels_of(([] if args.baseline in asked else split_names(args.baseline)) + asked)


def settings_of(args) -> dict[str, dict]:
    """{what a label ends with: how answers are drawn}, each temperature with each top_p and top_k.

    A label tells what varies; a setting holds top_p and top_k only where they are on.
    """
    texts = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    kinds = {"temperature": float, "top_p": float, "top_k": int}
    values = {flag: list(dict.fromkeys(map(kinds[flag], split_names(text)))) or [None] for flag, text in texts.items()}
    found = {}
    for chosen in product(*values.values()):
        setting = dict(zip(values, chosen, strict=True))
        varies = [f" {flag.removeprefix('top_')[0]}{setting[flag]}" for flag in values if len(values[flag]) > 1]
        off = (("top_p", None), ("top_p", 1), ("top_k", None))
        found["".join(varies)] = {flag: value for flag, value in setting.items() if (flag, value) not in off}
    return found


MODELS = ("config.json", "adapter_config.json", "started.json")  # what tells the folder of a model or of a run


def check(args) -> None:
    """Refuse what could only end in a misleading report, or in none, before a library is imported."""
    from prepare_data import check_names

    if not args.model_name_or_path and not args.reward_model_name_or_path:
        raise UserError("nothing to evaluate: give --model_name_or_path, or --reward_model_name_or_path alone")
    if args.baseline and not args.model_name_or_path:
        raise UserError("--baseline needs a --model_name_or_path to compare with it")
    if not args.dataset_names and not args.eval_dataset_names:
        raise UserError(
            "--dataset_names is missing: give those that the model was trained on; see prepare_data.py --list"
        )
    if args.dataset_names and args.eval_dataset_names:
        raise UserError("give --dataset_names or --eval_dataset_names, not both")
    if args.system_prompt is not None and not args.model_name_or_path:
        raise UserError("--system_prompt is for models that answer: give --model_name_or_path, or leave it out")
    if args.best_of > 1 and not (args.model_name_or_path and args.reward_model_name_or_path):
        raise UserError("--best_of needs a --model_name_or_path and a --reward_model_name_or_path that picks")
    temperatures = [setting["temperature"] for setting in settings_of(args).values()]
    if args.best_of > 1 and 0 in temperatures:
        raise UserError("--best_of with --temperature 0 would compare copies of one answer: sample at 1")
    if 0 in map(float, split_names(args.top_p)):
        raise UserError("--top_p 0 leaves no token: give above 0 to 1, or --temperature 0 for the likeliest token")
    if 0 in temperatures and (args.top_p or args.top_k):
        raise UserError(
            "--temperature 0 takes the likeliest token, where --top_p and --top_k do nothing: leave them out,"
            " or sample at 1"
        )
    for flag in ("model_name_or_path", "baseline", "reward_model_name_or_path"):
        for name in split_names(getattr(args, flag)):
            missing_path(flag, name)
    for name in split_names(args.votes):
        if not Path(name).is_file():
            raise UserError(f"--votes {name}: there is no such file\ngive the votes.jsonl that report.html saves")
    if any((Path(args.output_dir) / name).exists() for name in MODELS):
        raise UserError(f"--output_dir {args.output_dir} holds a model: name another folder for the report")
    check_folder("--output_dir", args.output_dir)
    task = "prompt" if args.model_name_or_path else "preference"
    check_names(task, args.dataset_names, args.eval_dataset_names, args.ignore_columns)


def load_rows(args, task: str, most: int) -> tuple[list[dict], dict]:
    from prepare_data import describe
    from rlhf.data.loading import load_held_out

    evals, data = load_held_out(
        args.dataset_names or args.eval_dataset_names,
        task,
        whole_files=not args.dataset_names,
        validation_split_percentage=args.validation_split_percentage,
        max_eval_samples=args.max_eval_samples or most,
        max_bad_percentage=args.max_bad_percentage,
        ignore_columns=args.ignore_columns,
        max_pairs_per_prompt=args.max_pairs_per_prompt,
    )
    print(describe(data))
    return [row for rows in evals.values() for row in rows], data


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from error


def load_judges(args, device) -> dict:
    from rlhf.models.rewards import load_reward

    judges = {}
    for label, name in labels_of(split_names(args.reward_model_name_or_path)).items():
        judges[label] = load_reward(name)
        if hasattr(judges[label], "model"):
            judges[label].model.to(device)
    return judges


def answer_all(args, columns: dict[str, tuple[str, dict]], rows: list[dict], folder: Path, device):
    """The answers of each column, {label: (model, setting)}, and what is measured of them: two {label: one a row}.

    The entry is None for a prompt that the model cannot read, and measured is only what those before could read too.
    One model is in memory at a time, beside the baseline.
    """
    from rlhf.evaluation.answers import Contestant, answer, measure

    asked, size = split_names(args.model_name_or_path), {"batch_size": args.per_device_eval_batch_size}
    shorts = {name: short for short, name in names_of(args).items()}
    model, baseline, answers, measured = None, None, {}, {}
    for label, (name, setting) in sorted(columns.items(), key=lambda item: item[1][0] != args.baseline):
        if model is None or model.name != name:
            model = None  # its memory goes before the next takes as much
            lengths = args.response_length, args.max_prompt_length
            model = Contestant(name, shorts[name], *lengths, device, args.system_prompt)
        baseline = model if name == args.baseline else baseline
        model.refused.clear()
        samples = args.best_of if name in asked else 1
        answers[label] = answer(model, rows, folder / "answers", samples=samples, seed=args.seed, **setting, **size)
        able = [i for i, made in enumerate(answers[label]) if made]
        refused = ", ".join(f"{reason} ({count})" for reason, count in model.refused.most_common(3))
        if not able:
            raise UserError(f"no prompt fits {name}: {refused or 'none can be rendered'}")
        if refused:
            print(f"{label}: prompts left out: {refused}")
        able = [i for i in able if all(made[i] for made in answers.values())]  # the baseline, too: it comes first
        if not able:
            raise UserError(f"no prompt is left that {name} and those before it can read")
        firsts = [answers[label][i][0] for i in able]
        found = measure(model, baseline, [rows[i] for i in able], firsts, setting["temperature"] or 1.0, **size)
        found = dict(zip(able, found, strict=True))
        measured[label] = [found.get(i) for i in range(len(rows))]
    return {label: answers[label] for label in columns}, {label: measured[label] for label in columns}


def command_of(args) -> str:
    """What was typed, but for --votes and flags at their defaults."""
    default = vars(make_parser().parse_args(["--output_dir="])) | {"votes": args.votes}
    flags = [f"--{key}={shlex.quote(str(value))}" for key, value in vars(args).items() if value != default[key]]
    return " ".join(["python evaluate_model.py", *flags])


def evaluate_models(args, judges: dict, device, folder: Path) -> dict:
    """The report on models: see `rlhf.evaluation.tables.summarize`."""
    from rlhf.evaluation.answers import Answer, judge_all
    from rlhf.evaluation.tables import pick_best, summarize, write_pairs, write_samples

    rows, data = load_rows(args, "prompt", 200)
    make_folder(folder / "answers")
    asked, settings = split_names(args.model_name_or_path), settings_of(args)
    columns = {
        short + ending: (name, setting)
        for short, name in names_of(args).items()
        for ending, setting in list(settings.items())[: None if name in asked else 1]
    }
    names = {label: name for label, (name, _) in columns.items()}
    baseline = next((label for label, name in names.items() if name == args.baseline), None)
    answers, measured = answer_all(args, columns, rows, folder, device)
    kept = [i for i in range(len(rows)) if all(made[i] for made in answers.values())]
    if not kept:
        raise UserError(f"no prompt is left that all of {', '.join(names.values())} can read")
    if len(kept) < len(rows):
        data["notes"].append(f"{len(rows) - len(kept)} prompts left out that not all of the models can read")
    rows = [rows[i] for i in kept]
    answers, measured = ({label: [v[i] for i in kept] for label, v in d.items()} for d in (answers, measured))
    if any(row["reference"] for row in rows):
        answers["data"] = [[Answer([], row["reference"], True) if row["reference"] else None] for row in rows]
        measured["data"] = [{} for _ in rows]
    scores = judge_all(judges, rows, answers, args.per_device_eval_batch_size)
    best_of = {label: pick_best(label, scores) for label in names if args.best_of > 1 and names[label] in asked}
    for label, found in best_of.items():
        path = folder / f"pairs_{re.sub('[/ ]', '_', label)}.jsonl"
        write_pairs(path, rows, answers[label], scores[found["picker"]][label])
    report = summarize(rows, answers, measured, scores, baseline)
    write_samples(folder / "samples.csv", rows, answers, scores, best_of)
    return report | {"models": names, "baseline": baseline, "judges": list(judges), "best_of": best_of, "data": data}


def main(args):
    check(args)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from rlhf.data.votes import load_votes
    from rlhf.evaluation.page import write_page
    from rlhf.evaluation.people import people_report
    from rlhf.evaluation.picture import draw
    from rlhf.evaluation.report import print_report, write_report
    from rlhf.evaluation.tables import reward_report

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, size = Path(args.output_dir), args.per_device_eval_batch_size
    votes = load_votes(split_names(args.votes)) if args.votes else []
    judges = load_judges(args, device)  # before anything else: a mistake in names should not cost an hour of sampling
    if args.model_name_or_path:
        report = evaluate_models(args, judges, device, folder)
    else:
        rows, data = load_rows(args, "preference", 2000)
        make_folder(folder)
        report = reward_report(judges, rows, folder, size) | {"data": data, "judges": list(judges)}
    if votes:
        samples = report["raw"]["samples"]
        report["people"] = people_report(votes, judges, samples, report.get("baseline"), size)
    report |= {"settings": vars(args), "command": command_of(args)}
    write_report(report, folder)
    draw(report, folder / "report.png")
    write_page(report, folder)
    print_report(report, folder)


if __name__ == "__main__":
    run_tool(main, make_parser)
