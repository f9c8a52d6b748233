"""Training that ends early because it was asked to."""

from __future__ import annotations

import itertools
from typing import Any

from transformers import TrainerCallback

from clha_fast.processes import all_stop


class StopAsked(TrainerCallback):
    """Ends training after the current step, with a checkpoint; of several processes all after the same one."""

    asked = stopped = False
    _made = itertools.count()  # alike in all processes: a folder's earlier run may have been stopped, too

    def __init__(self) -> None:
        self._run = str(next(self._made))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A step that happens to be the last one ends by itself.
        if all_stop(self.asked, state.global_step, self._run) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
