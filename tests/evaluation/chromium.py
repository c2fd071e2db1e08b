"""A headless Chromium with nothing remembered, and the report that it opens."""

import json
import shutil

import pytest

from rlhf.evaluation.answers import Answer
from rlhf.evaluation.page import write_page
from rlhf.evaluation.tables import samples_of

FLAGS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    " disable-component-update disable-sync window-size=1280,900"
)
MISSING = "NO CHROMIUM: the page is not tested in a browser. apt-get install chromium chromium-driver"


def open_browser(folder):
    """A new browser with a new profile, whose downloads come into the folder; skips the test where there is none."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip(MISSING)
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    (folder / "profile").mkdir(exist_ok=True)
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options=options, service=ChromeService(driver))
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    return browser


def requests_of(browser) -> list[str]:
    """All addresses that the browser has asked for since the last call, but for those that a policy kept from it."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["requestId"]: m["params"]["request"]["url"] for m in messages
             if m["method"] == "Network.requestWillBeSent"}  # fmt: skip
    failed = [m["params"] for m in messages if m["method"] == "Network.loadingFailed"]
    kept = {params["requestId"] for params in failed if params.get("blockedReason") == "csp"}
    return [url for name, url in asked.items() if name not in kept]


PIXEL = b"\x89PNG\r\n\x1a\n"


def page_of(folder, answers: dict[str, list[list[str]]], scores=None, prompts=None, baseline=None):
    """The address of a page with these answers, {label: samples of each row}, and their scores by judge."""
    size = len(next(iter(answers.values())))
    prompts = prompts or [[{"role": "user", "content": f"Question {i}?"}] for i in range(size)]
    rows = [{"dataset": "demo", "prompt": prompt, "reference": ""} for prompt in prompts]
    made = {label: [[Answer([], text, True) for text in texts] for texts in all] for label, all in answers.items()}
    report = {
        "models": {label: f"saved/{label}" for label in answers},
        "baseline": baseline,
        "judges": list(scores or {}),
        "best_of": {},
        "groups": {},
        "prompts": {},
        "data": {"notes": [], "evaluation": {"demo": {"held_out": False}}},
        "settings": {"seed": 1, "output_dir": "saved/eval", "eval_dataset_names": "a.jsonl", "temperature": "1",
                     "top_p": None, "top_k": None, "response_length": 8},
        "command": "python evaluate_model.py --output_dir=saved/eval",
        "raw": {"samples": samples_of(rows, made, scores or {})},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "report.png").write_bytes(PIXEL)
    write_page(report, folder)
    return (folder / "report.html").as_uri()
