"""Weights & Biases: one run of the project `sapo`, which goes on when this run does.

Its own environment variables say where to and how: WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline.
"""

import os
import re

from services.record_writers import Line, RecordWriter, Run, figures

SECONDS = 10.0  # for a server that does not answer: the process ends within them, too
STEP = "optimizer_step"  # its own step only counts up, and a step may be taken again


class WeightsAndBiases(RecordWriter):
    module = "wandb"

    def __init__(self, run: Run) -> None:
        import wandb

        quiet = wandb.Settings(
            console="off", silent=True, disable_code=True, x_disable_meta=True,
            init_timeout=SECONDS, finish_timeout=SECONDS,
        )  # fmt: skip
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "sapo", name=run.name, id=re.sub(r"[^\w.-]", "-", run.id),
            resume="allow", dir=run.directory, config=dict(run.config), settings=quiet,
        )  # fmt: skip
        self._run.define_metric("*", step_metric=STEP)

    def write(self, line: Line) -> None:
        if values := figures(line):
            self._run.log({STEP: line["step"], **values})

    def close(self) -> None:
        self._run.finish()
