"""Rank 0 tells how far it is, over HTTP, to whoever asks: the operator needs no credentials."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tempflow_api.errors import AddressInUse
from tempflow_api.naming import PROGRESS_PATH
from tempflow_api.status import Progress


class ProgressServer:
    """Serves the last progress record as JSON at ``/progress``."""

    def __init__(self, port: int) -> None:
        """Listen on every address of the pod.

        Raises:
            AddressInUse: another process has the port.
        """
        self._body = b""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                known = self.path == PROGRESS_PATH and owner._body
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(owner._body if known else b"{}")

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name)
                """Requests are not worth a line in the trainer's log."""

        try:
            self._server = ThreadingHTTPServer(("", port), Handler)
        except OSError as error:
            raise AddressInUse(
                f"port {port} for progress cannot be opened: {error.strerror}; set "
                "TEMPFLOW_PROGRESS_PORT to a free one"
            ) from error
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def announce(self, progress: Progress) -> None:
        """Replace the record that is served."""
        self._body = progress.model_dump_json(by_alias=True).encode()
