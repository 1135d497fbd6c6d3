"""``python -m hesper``, the command line."""

from hesper.cli.group import main

if __name__ == "__main__":
    main()
