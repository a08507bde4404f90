"""``python -m lightning_cl.cli``: the command line."""

from lightning_cl.cli import main

if __name__ == "__main__":
    main()
