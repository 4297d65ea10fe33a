"""`python -m minga.cli` is `minga`."""

from minga.cli.app import main

if __name__ == "__main__":
    main()
