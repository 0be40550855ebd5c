"""Flows: which work runs on which kind of machine, in what order."""
