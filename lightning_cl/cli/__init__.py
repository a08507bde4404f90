"""The command line ``lightning-cl``."""

from lightning_cl.cli.command import ContinualCLI, main

__all__ = ["ContinualCLI", "main"]
