"""Each look at the machine, in the situations that it is there to tell apart."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from mambatrain.planning import machine
from mambatrain.planning.findings import Finding, examine

Usage = namedtuple("Usage", "total used free")


def only(findings: object) -> Finding:
    (finding,) = list(findings)  # type: ignore[call-overload]
    return finding


class Answering(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """Answers on the loopback; the variables of the suite that say otherwise are gone."""
    for variable in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.mark.usefixtures("hub")
def test_a_hub_that_answers() -> None:
    found = only(machine.begin_looking_at_hub()())
    assert (found.status, found.mend) == ("ok", None)


@pytest.mark.usefixtures("hub")
def test_a_hub_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    found = only(machine.begin_looking_at_hub()())
    assert found.status == "note"
    assert "refused" in found.value
    assert found.mend == f"curl -I http://127.0.0.1:{port}"


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        found = only(machine.begin_looking_at_hub()())
    assert found.status == "note"
    assert time.monotonic() - start < 60  # it would be waited for without end


def test_offline_by_choice_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = only(machine.begin_looking_at_hub()())
    assert (found.status, found.mend) == ("note", "unset HF_HUB_OFFLINE")


def test_a_port_that_is_taken_and_one_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(machine, "RENDEZVOUS_PORT", taken.getsockname()[1])
        assert only(machine.look_at_port()).status == "note"
    assert only(machine.look_at_port()).status == "ok"


def test_a_disk_with_little_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - 2**30, 2**30))
    found = only(machine.look_at_disk())
    assert (found.status, found.value) == ("note", f"1.0 GiB free at {tmp_path}")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**40))
    assert only(machine.look_at_disk()).status == "ok"


def test_wandb_says_what_the_tracker_would_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.touch(mode=0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert only(machine.look_at_wandb()).value == "WANDB_MODE=disabled"
    monkeypatch.delenv("WANDB_MODE")
    assert only(machine.look_at_wandb()).mend == "wandb login"
    netrc.write_text("machine api.wandb.ai login user password secret-key\n")
    found = only(machine.look_at_wandb())
    assert found.status == "ok"
    assert "secret-key" not in found.value


def test_a_gpu_behind_a_torch_for_cpus_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: None)
    assert [finding.status for finding in machine.look_at_torch()] == ["ok", "ok"]
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: "580.65.06")
    _, cuda = machine.look_at_torch()
    assert (cuda.subject, cuda.status) == ("cuda", "problem")
    assert "580.65.06" in cuda.value
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _, cuda = machine.look_at_torch()
    assert cuda.status == "problem"
    assert "does not serve" in cuda.value


def test_a_look_that_fails_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("libtorch.so: no such symbol\nand more")

    found = only(examine("torch", broken))
    assert (found.subject, found.status) == ("torch", "problem")
    assert found.value == "RuntimeError: libtorch.so: no such symbol"
