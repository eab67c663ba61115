"""The server as one Starlette application: the APIs, the page, and what every request passes through."""

from importlib import util
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from lamini_jax.serving import limits, openai_api
from lamini_jax.serving.state import State

_PAGE = Path(__file__).parent / "page"


def make(state: State) -> Starlette:
    """The application of a server."""
    routes, middleware = openai_api.routes(state), limits.middleware(state.settings)
    if util.find_spec("lamini_jax.serving.watching"):  # TODO: plain imports, when both are there
        from lamini_jax.serving import watching

        routes, middleware = routes + watching.routes(state), watching.middleware(state) + middleware
    if util.find_spec("lamini_jax.serving.memory_api"):
        from lamini_jax.serving import memory_api

        routes += memory_api.routes(state)
    if _PAGE.is_dir():
        routes.append(Mount("/", StaticFiles(directory=_PAGE, html=True)))
    return Starlette(routes=routes, middleware=middleware, exception_handlers=limits.HANDLERS)
