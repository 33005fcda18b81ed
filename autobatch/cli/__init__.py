"""The command line: ``main`` runs a command and returns its exit code."""

from autobatch.cli.app import main

__all__ = ["main"]
