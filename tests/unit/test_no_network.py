"""The tests' own promise: no process reaches beyond this host. Run: pytest tests/unit/test_no_network.py"""

import socket
import sys

import pytest

from tests import tiny

OUTSIDE = ("192.0.2.1", 80)  # TEST-NET-1: reserved for documentation, nothing is there


def test_this_process_cannot_connect_outside():
    with socket.socket() as outside, pytest.raises(AssertionError, match="tried to connect"):
        outside.connect(OUTSIDE)


def test_started_processes_cannot_either():
    done = tiny.run([sys.executable, "-c", f"import socket; socket.socket().connect({OUTSIDE!r})"])
    assert done.returncode == 1
    assert "tried to connect" in done.stderr


def test_control_this_host_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
