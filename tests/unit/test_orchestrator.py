"""How a process finds its Prefect server, and what it does without one."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from configs.areas import OrchestratorSettings
from configs.settings import Settings
from flows.orchestrator import connect_or_go_alone


class Health(http.server.BaseHTTPRequestHandler):
    """Answers as Prefect's /api/health does, with the server's status."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/api/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest shows what matters."""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Prefect's variables, and as it was afterwards."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture(params=[200, 503], ids=["well", "ill"])
def health(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """The address of a server, and how it is."""
    handler = type("Answering", (Health,), {"status": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api", request.param
        server.shutdown()


def configured(url: str | None) -> Settings:
    return Settings(orchestrator=OrchestratorSettings(api_url=url))


def test_a_run_reports_to_a_server_that_is_well_and_goes_alone_beside_one_that_is_ill(
    environment: None, health: tuple[str, int]
) -> None:
    url, status = health
    assert connect_or_go_alone(configured(url)) is (status == 200)
    assert os.environ.get("PREFECT_API_URL") == (url if status == 200 else None)


def test_a_run_goes_alone_where_nobody_answers_although_the_environment_names_a_server(environment: None) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/api"
        os.environ["PREFECT_API_URL"] = url
        assert connect_or_go_alone(configured(url)) is False
    assert "PREFECT_API_URL" not in os.environ


def test_without_a_configured_server_a_run_is_its_own(environment: None) -> None:
    assert connect_or_go_alone(configured(None)) is True
    assert "PREFECT_API_URL" not in os.environ
