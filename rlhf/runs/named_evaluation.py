"""Evaluation metrics under the name of their dataset, each row counted once."""

from rlhf.user_error import UserError


class NamedEvaluation:
    """For TRL's trainers: `eval_hh_accuracy` where several datasets would share `eval_accuracy`.

    TRL averages its own metrics over batches, so a last batch of one row would weigh as much as a full one; here a
    batch counts as often as it has rows.
    """

    more_metrics = None  # a function that gives further ones of all datasets, as {name: value}

    def __init__(self, model, args, **kwargs):
        text_config = model.config.get_text_config()
        if getattr(args, "router_aux_loss_coef", None) and not hasattr(text_config, "output_router_logits"):
            raise UserError("--router_aux_loss_coef: the model is no mixture of experts; leave it out")
        super().__init__(model=model, args=args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            rows = len(inputs["input_ids"])
            for values in self._metrics["eval"].values():
                values += values[-1:] * (rows - 1)
        return result

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.more_metrics and eval_dataset is None:  # of all datasets, not of one of them
            more = {f"{metric_key_prefix}_{name}": value for name, value in self.more_metrics().items()}
            self.log(dict(more))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, more)
            metrics |= more
        best = self.args.metric_for_best_model
        if best and metric_key_prefix == "eval" and f"eval_{best.removeprefix('eval_')}" not in metrics:
            known = [key for key in metrics if not key.endswith(("_runtime", "_per_second", "epoch", "_num_tokens"))]
            hint = "\n  --generate_eval_samples 100 adds the ROUGE of generated answers" if "rouge" in best else ""
            raise UserError(f"--metric_for_best_model {best}: there is {', '.join(known)}{hint}")
        return metrics

    def log(self, logs, start_time=None):
        loss = next((key for key in logs if key.startswith("eval_") and key.endswith("_loss")), "eval_loss")
        dataset = loss.removeprefix("eval_").removesuffix("loss")  # "hh_", or "" where there is one nameless set
        metrics = self._metrics["eval"]
        for key in list(metrics) if dataset else []:
            metrics[dataset + key] = metrics.pop(key)
        super().log(logs, start_time)
