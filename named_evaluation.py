"""Evaluation metrics under the name of their dataset, each row counted once."""


class NamedEvaluation:
    """For TRL's trainers: `eval_hh_accuracy` where several datasets would share `eval_accuracy`.

    TRL averages its own metrics over batches, so a last batch of one row would weigh as much as a full one; here a
    batch counts as often as it has rows.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            rows = len(inputs["input_ids"])
            for values in self._metrics["eval"].values():
                values += values[-1:] * (rows - 1)
        return result

    def log(self, logs, start_time=None):
        loss = next((key for key in logs if key.startswith("eval_") and key.endswith("_loss")), "eval_loss")
        dataset = loss.removeprefix("eval_").removesuffix("loss")  # "hh_", or "" where there is one nameless set
        metrics = self._metrics["eval"]
        for key in list(metrics) if dataset else []:
            metrics[dataset + key] = metrics.pop(key)
        super().log(logs, start_time)
