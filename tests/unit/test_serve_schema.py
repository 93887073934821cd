"""What the server's OpenAPI document says, held against what it does, on requests made up from the document."""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks as openapi_checks
from starlette.types import Receive, Scope, Send

from deadpan.serve.app import create_app
from deadpan.serve.tellers import Tellers
from echo import Echo

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
]
BOUNDED = settings(
    max_examples=20,
    phases=[Phase.generate],
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
def test_made_up_requests_get_answers_that_the_document_names() -> None:
    engine = Echo()
    engine.let.set()
    app = create_app(Tellers({"echo": engine}), max_pixels=10_000)

    async def unending(scope: Scope, receive: Receive, send: Send) -> None:
        """The app, without its end: each request is made by a client of its own, which would shut it down."""
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await app(scope, receive, send)

    schema = schemathesis.openapi.from_asgi("/openapi.json", unending)
    met: Counter[tuple[str, int]] = Counter()
    found = list(schema.get_all_operations())
    operations = [each.ok() for each in found if isinstance(each, Ok)]
    assert len(operations) == len(found) == 5
    for operation in operations:
        # A request that has nothing in it cannot be wrong.
        has_body = bool(list(operation.body))
        for mode in GenerationMode if has_body else [GenerationMode.POSITIVE]:

            @given(case=operation.as_strategy(generation_mode=mode))
            @BOUNDED
            def ask(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "echo"
                answer = case.call_and_validate(checks=CHECKS)
                met[case.path, answer.status_code // 100] += 1

            ask()
    chat = "/v1/chat/completions"
    assert met[chat, 2] > 2
    assert met[chat, 4] > 10
