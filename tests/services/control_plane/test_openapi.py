"""The API as its own description has it: what fits the description, and what nearly does, is never answered by a 500.

Examples are schemathesis', the same ones every time.
"""

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from services.control_plane.routes import add_routes
from services.runtime.http import probe_app
from services.runtime.lifecycle import Lifecycle
from services.runtime.metrics import ControlPlaneMetrics
from tests.small_run import TOKEN, Learner, Running

EXAMPLES = 6  # of each operation, in each mode
ENDLESS = {"/v1/events", "/v1/live"}  # streams without a parameter; tested elsewhere
PICKY = {"POST /v1/policies", "POST /v1/evaluations/results", "POST /v1/groups"}  # more is asked than types can say
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def described(running: Running) -> dict[str, Any]:
    app = probe_app(Lifecycle(), ControlPlaneMetrics().registry)
    add_routes(app, running.plane, TOKEN)
    return app.openapi()


def operations(running: Running) -> dict[str, Any]:
    schema = schemathesis.openapi.from_dict(described(running))
    found = [result.ok() for result in schema.get_all_operations()]
    return {each.label: each for each in found if each.path not in ENDLESS}


def ask(running: Running, operation: Any, mode: GenerationMode) -> list[int]:
    """The statuses of all examples' answers. A thread's work: the server has the event loop."""
    statuses = []

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("wait_seconds"), int | float):
            case.body["wait_seconds"] = min(case.body["wait_seconds"], 0)
        response = case.call(base_url=running.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20)
        statuses.append(response.status_code)
        told = response.status_code == 503 and response.json()["error"]["kind"] == "Unavailable"
        assert response.status_code < 500 or told, f"{case.as_curl_command()}: {response.text[:500]}"
        if response.status_code >= 400 and operation.method.upper() != "HEAD":
            assert set(response.json()["error"]) == {"kind", "code", "what", "where", "fix"}

    one()
    return statuses


@pytest.mark.timeout(400)
async def test_nothing_that_fits_the_description_or_nearly_does_is_answered_by_500(
    running: Running, learner: Learner
) -> None:
    answers = {}
    for label, operation in operations(running).items():
        for mode in GenerationMode:
            if mode is GenerationMode.POSITIVE or operation.body:  # a path is never wrong, only unknown
                answers[label, mode] = set(await asyncio.to_thread(ask, running, operation, mode))
    bodies = {label for label, mode in answers if mode is GenerationMode.NEGATIVE}
    assert len(bodies) == 7, "every route that takes one"
    taken = {label for label in bodies - PICKY if 200 in answers[label, GenerationMode.POSITIVE]}
    assert taken, "what fits is not refused throughout"
    for label in bodies:
        assert answers[label, GenerationMode.NEGATIVE] <= {400, 422}, label
    assert (await running.client.status())["run"] == running.config.run.name
