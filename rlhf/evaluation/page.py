"""report.html: the report, all answers to read, and a blind judge's desk, in one file that needs no server.

The template fills in the tables; what there is to read and to judge lies in the page as JSON, and the scripts show it,
as text only. Nothing leaves the page: its policy allows its own style and script, by their hashes, and no address.
"""

import base64
import hashlib
import json
import shlex
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from rlhf.evaluation.report import page, sections

FOLDER = Path(__file__).parent
SCRIPTS = ("page.js", "read.js", "judge.js", "result.js")


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def embedded(data) -> str:
    """JSON for a script element, which no text in it can end or make a comment of; ASCII, whatever its text."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def allowed(text: str) -> str:
    """An inline style or script as the policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def judged_rows(samples: list[dict]) -> list[dict]:
    """The samples as the page reads them: scores to four digits are enough for the eye."""

    def short(scores):
        return [value if value is None else float(f"{value:.4g}") for value in scores]

    return [
        {name: row[name] for name in ("dataset", "prompt", "answers", "ended")}
        | {"scores": {judge: {label: short(s) for label, s in by.items()} for judge, by in row["scores"].items()}}
        for row in samples
    ]


def page_data(report) -> dict:
    """What the scripts are told; "id" changes with the answers, so that votes kept in a browser find their own."""
    rows = judged_rows(report["raw"]["samples"])
    texts = json.dumps([[row["prompt"], row["answers"]] for row in rows])
    return {
        "id": hashlib.sha256(texts.encode()).hexdigest()[:12],
        "seed": report["settings"]["seed"],
        "labels": list(dict.fromkeys(label for row in rows for label in row["answers"])),
        "models": {label: shlex.quote(str(name)) for label, name in report.get("models", {}).items()},
        "baseline": report.get("baseline"),
        "judges": report["judges"],
        "held_out": [label for label, entry in report["data"]["evaluation"].items() if entry["held_out"]],
        "rows": rows,
        "next": next_steps(report),
    }


def next_steps(report) -> list[list[str]]:
    """[why, command] of what to do with votes; <MODEL> stands for the model that the votes are on."""
    settings = report["settings"]
    votes = shlex.quote(f"{settings['output_dir']}/votes.jsonl")
    steps = [["Your votes beside the judges' scores", f"{report['command']} --votes={votes}"]]
    if "models" not in report:
        return steps
    if not all(entry["held_out"] for entry in report["data"]["evaluation"].values()):
        flags = f"--model_name_or_path=<MODEL> --dataset_names={votes} --output_dir=saved"
        return steps + [
            ["Train a policy on your votes", f"accelerate launch dpo_training.py {flags}/dpo_on_votes"],
            ["Or a reward model", f"accelerate launch reward_modeling.py {flags}/reward_on_votes"],
        ]
    names = shlex.quote(settings["dataset_names"] or settings["eval_dataset_names"])
    judge = settings["reward_model_name_or_path"]
    judge = f" --reward_model_name_or_path={shlex.quote(judge)} --best_of=4" if judge else ""
    return steps + [
        [
            "These prompts are held out, to measure on. To train on votes, judge answers to others; first export them",
            f"python prepare_data.py --dataset_names={names} --task=prompt --output_dir=saved/to_judge",
        ],
        [
            "Then have them answered",
            f"python evaluate_model.py --model_name_or_path=<MODEL>{judge}"
            " --eval_dataset_names=saved/to_judge/train.jsonl --output_dir=saved/judging",
        ],
    ]


def write_page(report, folder: Path) -> None:
    """report.html, with the picture report.png that lies beside it."""
    style, script = read("page.css"), "\n".join(map(read, SCRIPTS))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(read("page.html.jinja")).render(
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src {allowed(style)}; script-src {allowed(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        picture=base64.b64encode((folder / "report.png").read_bytes()).decode(),
        data=embedded(page_data(report)),
        sections=sections(report),
        notes=str(page(report).notes).splitlines(),
    )
    # a name or a title may hold what no encoding has
    (folder / "report.html").write_text(text, encoding="utf-8", errors="backslashreplace")
