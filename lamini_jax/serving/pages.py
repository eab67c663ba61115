"""The page at `/`: files of this package alone. The browser is told to load nothing else and to run nothing inline."""

from pathlib import Path

from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

_FOLDER = Path(__file__).parent / "page"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asks each time whether it is still the same, so that a new version is seen at once
}


class _Page(StaticFiles):
    """Its files, with these headers."""

    def file_response(self, *arguments, **options):
        response = super().file_response(*arguments, **options)
        response.headers.update(_HEADERS)
        return response


def route() -> Mount:
    """The route of the page, which comes after all others."""
    return Mount("/", _Page(directory=_FOLDER, html=True))
