"""``python -m cectflow``: the command line."""

from cectflow.cli import main

if __name__ == "__main__":
    main()
