"""`python -m sft.doctor`, which launchers call on every rank."""

from sft.doctor.run import main
from sft.errors import run_rank

if __name__ == "__main__":
    run_rank(main)
