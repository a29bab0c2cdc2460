"""A run's directory after real training on a recorded log: archive, checkpoints, model, and the record of its steps."""

from pathlib import Path
from typing import Any

from sapo_learner.config import parse
from services.control_plane.record import Record
from services.runtime.settings import RunConfig, save_config
from tests.services.learner.recorded_run import Run


def trained_run(directory: Path, *, steps: int = 12, **settings: dict[str, Any]) -> Path:
    """Checkpoints of step 0 and the last three even ones are kept. settings: change sections of run.yaml."""
    run = Run(directory, steps=steps)
    sections = run.config.model_dump(mode="json") | settings
    run.config = parse(RunConfig, sections, where="test")
    save_config(run.config)
    record = Record(directory / "record.jsonl")
    with run.session() as session:
        session.run(lambda _: None, lambda news: add_step(record, news.record))
    return directory


def add_step(record: Record, line: dict[str, Any]) -> None:
    record.add("step", **{key: value for key, value in line.items() if key != "kind"})
