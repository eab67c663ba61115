"""The server as one Starlette application: the APIs, the page, and what every request passes through."""

from starlette.applications import Starlette

from lamini_jax.serving import limits, memory_api, openai_api, openapi, pages, watching
from lamini_jax.serving.state import State


def make(state: State) -> Starlette:
    """The application of a server."""
    watch = watching.Watch(state)
    described = openapi.route(openai_api.OPERATIONS + memory_api.OPERATIONS)
    routes = [*openai_api.routes(state), *memory_api.routes(state), *watch.routes(), described, pages.route()]
    middleware = watch.middleware() + limits.middleware(state.settings)
    return Starlette(routes=routes, middleware=middleware, exception_handlers=limits.HANDLERS)
