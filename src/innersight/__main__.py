"""`python -m innersight` is the command line."""

from innersight.cli import main

if __name__ == "__main__":
    main()
