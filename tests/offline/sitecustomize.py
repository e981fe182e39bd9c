"""Imported by every Python process that a test starts: sockets may only connect to this host."""

import socket

_connect = socket.socket.connect
LOCAL = ("127.", "::1", "localhost", "::ffff:127.")


def _local_only(self: socket.socket, address: object) -> None:
    if isinstance(address, tuple) and not str(address[0]).startswith(LOCAL):
        raise AssertionError(f"a test process tried to connect to {address}")
    _connect(self, address)


socket.socket.connect = _local_only
