"""What may stop a run: steps whose gradient is not finite."""

MAX_SKIPPED_IN_A_ROW = 3


class SkipCounter:
    """Counts optimizer steps that were not taken because loss or gradient was not finite."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def update(self, applied: bool, step: int) -> None:
        """Note the outcome of a step.

        Raises:
            RuntimeError: too many in a row; the weights are those of the last good step.
        """
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"step {step}: loss or gradient was not finite {self.in_a_row} steps in a row; the doc_ids are in "
                "events.jsonl. Usual causes: a learning rate that is too high, a broken base model, damaged data"
            )
