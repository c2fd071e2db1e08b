"""The report's page as a file: what is in it, its policy, its colours: `pytest tests/evaluation/test_page.py`."""

import base64
import hashlib
import json
import re
import shlex
from html.parser import HTMLParser

import pytest

import evaluate_model
import prepare_data
from rlhf.evaluation.page import FOLDER, SCRIPTS, next_steps
from tests.evaluation.chromium import page_of

HOSTILE = "</script><script>alert(1)</script><!-- <script> ]]> \u2028 \ud800 & &lt; '\""


class Parsed(HTMLParser):
    """The elements with their attributes, and the contents of those whose text is raw."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.raw, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside in ("script", "style"):
            self.raw[len(self.elements)] = self.raw.get(len(self.elements), "") + data


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    answers = {"a <b>": [[HOSTILE]], "b": [["plain"]]}
    page_of(tmp_path_factory.mktemp("page") / "report", answers, {HOSTILE: {"a <b>": [[1]], "b": [[2]]}})
    return next(tmp_path_factory.getbasetemp().glob("page*/report/report.html")).read_text(encoding="utf-8")


def test_data_cannot_leave_its_element(text):
    page = Parsed(text)
    assert [tag for tag, _ in page.elements].count("script") == 2
    data, script = [page.raw[i + 1] for i, (tag, _) in enumerate(page.elements) if tag == "script"]
    assert json.loads(data)["rows"][0]["answers"]["a <b>"] == [HOSTILE] and "<" not in data
    assert script == "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)


def test_the_policy_allows_what_is_in_the_page_and_nothing_else(text):
    page = Parsed(text)
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules.pop("img-src") == "data:"
    for tag in ("style", "script"):
        inside = [page.raw[i + 1] for i, (name, a) in enumerate(page.elements) if name == tag and "type" not in a][0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert not rules
    addresses = [value for _, a in page.elements for name, value in a.items() if name in ("src", "href", "action")]
    assert all(value.startswith(("#", "data:image/png")) for value in addresses)
    assert not [name for _, a in page.elements for name in a if name.startswith("on") or name == "style"]
    code = "".join((FOLDER / name).read_text() for name in SCRIPTS)
    unsafe = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|fetch\(|import\b|http"
    assert not re.search(unsafe, code)


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_have_the_contrast_of_wcag_aa(theme):
    roots = re.findall(r":root \{(.*?)\}", (FOLDER / "page.css").read_text(), re.DOTALL)
    assert len(roots) == 2
    color = dict(re.findall(r"--([\w-]+): (#\w{6})", roots[theme]))
    assert color.keys() == dict(re.findall(r"--([\w-]+): (#\w{6})", roots[0])).keys()
    for ink, grounds in {
        "ink": ("page", "card", "notice", "code"),
        "quiet": ("page", "card"),
        "accent": ("page", "card"),
        "good": ("card",),
        "on-accent": ("accent",),
    }.items():
        for ground in grounds:
            assert contrast(color[ink], color[ground]) >= 4.5, (ink, ground)
    for ground in ("page", "card"):  # of fields and buttons, and of the focus
        assert contrast(color["line"], color[ground]) >= 3 and contrast(color["accent"], color[ground]) >= 3
    used = set(re.findall(r"(?<!-)#[0-9a-f]{3,6}\b", (FOLDER / "page.css").read_text())) - set(color.values())
    assert not used - set(re.findall(r"#\w{6}", "".join(roots)))


@pytest.mark.parametrize("held_out", [False, True])
def test_what_to_type_next_is_what_can_be_typed(held_out):
    names = {"eval_dataset_names": None, "dataset_names": "ufb,hh"} if held_out else {"eval_dataset_names": "a.jsonl"}
    settings = names | {"output_dir": "saved/my eval", "reward_model_name_or_path": "saved/reward"}
    command = "python evaluate_model.py --model_name_or_path=saved/sft --output_dir='saved/my eval'"
    data = {"evaluation": {"all": {"held_out": held_out}}}
    steps = next_steps({"models": {}, "settings": settings, "command": command, "data": data})
    assert len(steps) == 3 and held_out == any("held out" in why for why, _ in steps)
    for _, typed in steps:
        words = shlex.split(typed.replace("<MODEL>", "saved/sft"))
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        if words[at] in ("evaluate_model.py", "prepare_data.py"):
            module = evaluate_model if words[at] == "evaluate_model.py" else prepare_data
            args = module.make_parser().parse_args(words[at + 1 :])
            assert "--votes" not in typed or args.votes == "saved/my eval/votes.jsonl"
        else:
            assert words[:2] == ["accelerate", "launch"] and words[at] in ("dpo_training.py", "reward_modeling.py")
            assert "--dataset_names=saved/my eval/votes.jsonl" in words
