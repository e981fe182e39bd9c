"""`python -m sft.eval`, which launchers call."""

import sys

from sft.errors import run_command
from sft.eval.evaluate import main

if __name__ == "__main__":
    sys.exit(run_command(main))
