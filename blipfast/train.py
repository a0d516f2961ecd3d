"""Train from a config.

    deepspeed blipfast/train.py --config configs/X.yaml [--set key=value ...] [--resume auto|PATH|none] [--overwrite]
    torchrun --nproc_per_node 2 blipfast/train.py --config ...      the same engine, another launcher
    python blipfast/train.py --config ...                           one process, plain torch: needs no DeepSpeed

`deepspeed` alone starts one rank a GPU, on CPU one rank; `deepspeed --num_gpus 2` two, also on CPU. `--quiet`, and on
CPU DS_ACCELERATOR=cpu in the environment, silence the launcher. Two runs of several ranks on one machine need two
ports (`--master_port`). Ctrl-C or SIGTERM saves a checkpoint; the same command goes on from the newest one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == _HERE:
    sys.path[0] = str(
        _HERE.parent
    )  # the launcher put blipfast/ itself first; its modules are not top-level ones


def main(argv: Sequence[str] | None = None, build: Any = None) -> int:
    """Parse the command line, train, return the exit status: 0, or 1 after one message about what is wrong.

    build: (config, rank, world_size) -> task; the tasks of `blipfast.tasks` by default.
    """
    args = _parser().parse_args(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo's warnings about host names
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by torch under train.deterministic
    from blipfast.config import load_config
    from blipfast.training import TrainingError, run

    try:
        if build is None:
            from blipfast.tasks import build
        return run(load_config(args.config, args.set), build, args.resume, args.overwrite)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        if args.traceback:
            raise
        _complain(error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file, such as configs/emoji.yaml")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="train.lr=1e-4 ..."
    )
    parser.add_argument(
        "--resume", default="auto", help="auto (the newest checkpoint of the output), a folder, or none"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the earlier run in the output folder"
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # given by the launcher, read from LOCAL_RANK
    return parser


def _complain(error: Exception) -> None:
    """One message: rank 0 speaks; another rank only if rank 0 has not failed too (then we are ended meanwhile)."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(5)
    print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
