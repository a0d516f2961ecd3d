"""The training loop: DeepSpeed when a launcher started us, plain torch on one process otherwise.

One idea a file: `distributed` (ranks and collectives), `optimizer`, `muon`, `schedule` (learning rate), `engine` and
`deepspeed_engine` (forward, backward, step, access to sharded state), `ema` (momentum encoders), `checkpoint`, `start`
(where a run starts), `lock` (one run a folder), `signals`, `errors`, `log`, and `loop`, which joins them. `run` is the
way in.
"""

from .errors import CheckpointError, NotFinite, TrainingError
from .loop import run

__all__ = ["CheckpointError", "NotFinite", "TrainingError", "run"]
