"""Serving the page: on this machine alone unless asked otherwise, and never with anything from elsewhere."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ComcatError
from .shared import Shared

MISSING = "comcat ui needs another package. Install it: pip install 'comcat[ui]'"
#: What the browser may ask for: this page's own, nothing from elsewhere; nor may another page frame it.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'self'; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)


def check_packages() -> None:
    """Raise ComcatError where the package of the page, or one that it needs, is missing."""
    # Before gradio is imported, which reads them then.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ComcatError(MISSING) from error
    if int(gradio.__version__.partition(".")[0]) < 6:
        raise ComcatError(f"gradio {gradio.__version__} is too old for comcat ui. Upgrade it: pip install 'gradio>=6'")


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there.

    Raises:
        ComcatError: the port is taken or not to be had, or there is no such address here.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise ComcatError(
                f"port {port} of {host} is taken, perhaps by another comcat ui; choose another one: --port {port + 1}"
            ) from error
        if number in (errno.EACCES, errno.EPERM):
            raise ComcatError(f"port {port} may not be used here; choose one above 1023: --port 7860") from error
        raise ComcatError(
            f"{host!r} is no address of this machine ({getattr(error, 'strerror', None) or error}); leave --host out "
            "for this machine alone, or give 0.0.0.0 for all of its addresses"
        ) from error
    with found:
        yield found


def serve(shared: Shared, listener: socket.socket, begun: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C, or until this process is told to end.

    Args:
        begun: told the page's address, once it answers.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from .look_of_page import STYLE, theme
    from .web_page import build_page

    os.environ["GRADIO_TEMP_DIR"] = str(shared.scratch / "gradio")
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    app = gr.mount_gradio_app(
        FastAPI(),
        build_page(shared),
        "/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        allowed_paths=[str(shared.scratch)],
        theme=theme(),
        css=STYLE,
    )
    config = uvicorn.Config(guarded(app), log_level="error", timeout_graceful_shutdown=1, lifespan="on")

    class Told(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            begun(f"http://{shown}:{port}")

    Told(config).run(sockets=[listener])


def guarded(app: Any) -> Any:
    """An ASGI application whose answers carry the policy above."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        async def policed(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        await app(scope, receive, policed)

    return call
