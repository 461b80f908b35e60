"""The embedded stack: both services on this machine, on private sockets, for whoever has none."""
