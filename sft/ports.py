"""A free port of this host, for process groups that live on it alone."""

import socket


def free_port() -> str:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
