"""`python -m data_prep`."""

from data_prep.build import main
from sft.errors import run_command

if __name__ == "__main__":
    raise SystemExit(run_command(main))
