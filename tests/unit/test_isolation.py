"""The fences that tests/conftest.py puts around every test."""

from __future__ import annotations

import os
import socket

import pytest


def test_connections_off_this_machine_are_refused() -> None:
    with pytest.raises(OSError, match="the network is off in tests"), socket.socket() as outside:
        outside.settimeout(1)
        outside.connect(("192.0.2.1", 80))  # TEST-NET-1: no one's address


def test_the_loopback_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_hubs_and_trackers_are_offline_in_processes_that_tests_start() -> None:
    assert {os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")} == {"1"}
    assert os.environ["WANDB_MODE"] == "offline"


def test_a_test_has_the_marker_of_its_folder(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("unit")
    assert not request.node.get_closest_marker("gpu")
