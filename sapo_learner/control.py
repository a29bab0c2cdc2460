"""Entries of the log that are no groups: what else steers the learner is recorded too, so that a replay obeys it.

`config`: new settings of the algorithm, in force from the step on whose groups follow or surround the entry.
"""

import json
from collections.abc import Iterable
from typing import Any

from sapo_learner.archive import Entry
from sapo_learner.config import LearnerSettings, parse
from sapo_learner.errors import Corrupt

GROUP, CONFIG = "group", "config"


def encode_settings(settings: LearnerSettings) -> bytes:
    """The payload of a `config` entry."""
    return json.dumps(settings_of(settings), sort_keys=True, separators=(",", ":")).encode()


def settings_of(settings: LearnerSettings) -> dict[str, Any]:
    """The algorithm's settings alone, as JSON data, also of a model that adds others."""
    return settings.model_dump(mode="json", include=set(LearnerSettings.model_fields))


def decode_settings(entry: Entry) -> LearnerSettings:
    """Raises Corrupt for an entry that is no `config`, ConfigError for a payload that is not one of ours."""
    if entry.kind != CONFIG:
        raise Corrupt(f"entry {entry.id} is of kind {entry.kind!r}", fix="was it written by a newer version?")
    return parse(LearnerSettings, json.loads(entry.payload), where=f"entry {entry.id}")


def last_settings(entries: Iterable[Entry], before: LearnerSettings) -> LearnerSettings:
    """The settings in force after `entries`, given those in force before."""
    for entry in entries:
        if entry.kind != GROUP:
            before = decode_settings(entry)
    return before
