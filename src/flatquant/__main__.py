"""`python -m flatquant`, the same as `flatquant`."""

from flatquant.cli import main

if __name__ == "__main__":
    main()
