"""The server as one Starlette application: the APIs, the page, and what every request passes through."""

from starlette.applications import Starlette

from lamini_jax.serving import limits, memory_api, openai_api, openapi, pages, watching
from lamini_jax.serving.state import State


def make(state: State) -> Starlette:
    """The application of a server."""
    watch = watching.Watch(state)
    described = openapi.route(openai_api.OPERATIONS + memory_api.OPERATIONS)
    routes = [*openai_api.routes(state), *memory_api.routes(state), *watch.routes(), described]
    middleware = watch.middleware() + limits.middleware(state.settings)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=limits.HANDLERS)
    page, nowhere = pages.route(), app.router.default

    async def otherwise(scope, receive, send) -> None:
        # Not a route among the others: it would match every path, also those of the APIs with another method.
        scope["route"] = page
        await (page.app if scope["type"] == "http" else nowhere)(scope, receive, send)

    app.router.default = otherwise
    return app
