"""The console that commands print to."""

from rich.console import Console


class Output(Console):
    """Standard output. A reader that leaves, as in `sft show runs/x | head`, is no failure: rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Leave the ending to `sft.errors.run_command`.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError
