"""Serving the registered champion over HTTP: requests join the running batch as they arrive, the alias is followed."""
