"""What a run shows while it works and leaves behind: a bar, `training_log.jsonl`, `learning_curves.png`."""

import json
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback

from rlhf.runs.checkpoints import write_whole

LOG = "training_log.jsonl"

# What a reader wants to see of a stage, in this order: curves are drawn of all that a log has, the bar shows the first
# ones.
CURVES = [
    "loss", "mean_token_accuracy", "rouge_avg", "accuracy", "margin", "rewards/accuracies", "rewards/margins",
    "objective/scores", "objective/kl", "val/mean_length", "loss/policy_avg", "loss/value_avg",
]  # fmt: skip


def say(text: str) -> None:
    """Print once a machine, whatever the number of processes."""
    PartialState().print(text)


class RunLog(TrainerCallback):
    """Writes each log entry to `training_log.jsonl` and draws the curves at each checkpoint."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path = Path(args.output_dir) / LOG
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = read_log(self.path)[: self.trainer.log_lines]  # what came after the checkpoint comes again
            write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and hasattr(self, "path"):
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_save(self, args, state, control, **kwargs):
        self.draw()  # so that a run that is killed leaves them beside its last checkpoint

    def draw(self):
        if hasattr(self, "path"):
            draw_curves(self.path, self.path.with_name("learning_curves.png"))


def read_log(path) -> list[dict]:
    """The entries of a training_log.jsonl, but for a last line that was not written to its end."""
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Progress(TrainerCallback):
    """A bar with the figures that matter, and one line an evaluation, in place of transformers' printed dicts."""

    def __init__(self):
        self.bar = self.evaluation = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.bar is not None:
            self.evaluation = self.evaluation or tqdm(
                total=len(eval_dataloader), desc="evaluate", leave=False, dynamic_ncols=True
            )
            self.evaluation.update()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.evaluation is not None:
            self.evaluation.close()
        self.evaluation = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None:
            return
        named = {key: value for key, value in (logs or {}).items() if isinstance(value, float)}
        shown = []
        for name in CURVES:
            for key, value in named.items():
                if key == name or is_held_out(key, name):
                    text = f"{key.removeprefix('eval_').removeprefix('objective/')} {value:.4g}"
                    shown.append(text + error_of(named, key))
        if any(key.startswith("eval_") for key in named):
            self.bar.write(f"step {state.global_step} of {state.max_steps}, held out: {', '.join(shown[:4])}")
        elif shown:
            self.bar.set_postfix_str(", ".join(shown[:3]))

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
        self.bar = None


class Patience(EarlyStoppingCallback):
    """Ends training when the best metric has not risen for so many evaluations.

    transformers' own callback is shown each dataset's metrics apart and complains of those that it does not look for.
    """

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
            worse = self.early_stopping_patience_counter >= self.early_stopping_patience
            if worse and state.is_world_process_zero:
                count = f"{self.early_stopping_patience} evaluation{'s' * (self.early_stopping_patience > 1)} in a row"
                tqdm.write(f"stops at step {state.global_step}: {count} without a better {args.metric_for_best_model}")


def watch(trainer, patience: int) -> None:
    """Give a trainer the log, the curves and the bar of this module; and an end, when so many evaluations in a row
    are not better (0 for never).
    """
    if patience:
        trainer.add_callback(Patience(patience))
    log, train = RunLog(trainer), trainer.train
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(log)
    trainer.add_callback(Progress())

    def train_and_draw(*args, **kwargs):
        try:
            return train(*args, **kwargs)
        finally:
            log.draw()  # however it ends: Ctrl-C and errors reach no callback

    trainer.train = train_and_draw


def error_of(metrics: dict, key: str) -> str:
    """` +- 0.05`: the standard error of a held-out metric, where it is known."""
    return f" +- {metrics[f'{key}_se']:.2g}" if f"{key}_se" in metrics else ""


def short(name: str) -> str:
    """A metric's name as it is logged of held-out rows: `objective/scores` is `eval_hh_scores` there."""
    return name.removeprefix("objective/").removeprefix("val/")


def is_held_out(key: str, name: str) -> bool:
    """Whether a logged key is that metric on held-out rows; `eval_hh_mean_token_accuracy` is no `accuracy`."""
    fitting = [curve for curve in CURVES if key.startswith("eval_") and key.endswith(f"_{short(curve)}")]
    return bool(fitting) and max(fitting, key=len) == name


def draw_curves(log_path, picture_path) -> None:
    """The curves of a training_log.jsonl as a picture: training as a line, evaluation as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log = read_log(log_path)
    keys = dict.fromkeys(key for entry in log for key in entry)

    def points(key):
        return zip(*((entry["step"], entry[key]) for entry in log if key in entry), strict=True)

    shown = {name: [key for key in keys if key == name or is_held_out(key, name)] for name in CURVES}
    for name, lines in shown.items():
        lines.sort(key=lambda key, name=name: key != name)  # training first, in the same colour everywhere
    shown = {name: lines for name, lines in shown.items() if lines}
    if not shown:
        return
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes.flat, shown, strict=False):
        for key in shown[name]:
            dataset = key.removesuffix(f"_{short(name)}")
            axis.plot(*points(key), *([] if key == name else ["o--"]), label="train" if key == name else dataset)
        axis.set_title(name)
        axis.set_xlabel("optimizer step")
        axis.legend(fontsize="small")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    figure.savefig(picture_path, dpi=110)
    pyplot.close(figure)
