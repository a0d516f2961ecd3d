"""The training loop: DeepSpeed when a launcher started us, plain torch on one process otherwise.

One idea a file: `distributed` (ranks and collectives), `optimizer`, `schedule` (learning rate), `engine` and
`deepspeed_engine` (forward, backward, step, access to sharded state), `ema` (momentum encoders), `checkpoint`,
`log`, and `loop`, which joins them. `run` is the way in.
"""

from .errors import CheckpointError, NotFinite, TrainingError
from .loop import run

__all__ = ["CheckpointError", "NotFinite", "TrainingError", "run"]
