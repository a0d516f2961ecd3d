"""train.py on its real tasks, several runs a launch: `deepspeed tests/pretrain_run.py --config ... --then ...`."""

import sys

from tests.toy_run import run_all

if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]))
