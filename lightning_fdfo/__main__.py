"""`python -m lightning_fdfo` is the command `lightning-fdfo`."""

from lightning_fdfo.cli import main

if __name__ == "__main__":
    main()
