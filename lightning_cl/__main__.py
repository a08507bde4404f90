"""``python -m lightning_cl``: the command line."""

from lightning_cl.cli.command import main

if __name__ == "__main__":
    main()
