"""`riskscore serve` with two more endpoints that take a request and do nothing: what benchmarks/api.py compares with.

    RISKSCORE_MODEL=data/models/champion.json python benchmarks/noop.py

POST /noop is a route of FastAPI, as any no-op of a FastAPI service; POST /noop-bare stands before FastAPI, where /predict stands too, so it shows what the
server and the guard take by themselves. Settings are those of `riskscore serve`, from the environment.
"""
import os
import sys
from typing import Any

from fastapi import Request, Response

from riskscore.server import leave_out, serve
from riskscore.settings import settings_from

leave_out()  # as the service does, before LightGBM is imported
from riskscore.api import _body_of, create_app  # noqa: E402

NOTHING = b'{}'
HEADERS = [(b'content-type', b'application/json'), (b'content-length', b'2')]


class Bare:
    "Answers POST /noop-bare, and hands everything else on."

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope['type'] != 'http' or scope['path'] != '/noop-bare':
            return await self.app(scope, receive, send)
        await _body_of(receive)
        await send({'type': 'http.response.start', 'status': 200, 'headers': [*HEADERS]})
        await send({'type': 'http.response.body', 'body': NOTHING})


def with_noop() -> Any:
    "The scoring service, and endpoints that do nothing."
    guard = create_app()
    front = guard.app

    @front.app.post('/noop')
    async def noop(request: Request) -> Response:
        await request.body()
        return Response(NOTHING, media_type='application/json')

    guard.app = Bare(front)
    return guard


if __name__ == '__main__':
    sys.exit(serve(settings_from(os.environ), 'noop:with_noop'))
