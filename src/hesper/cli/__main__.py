"""``python -m hesper.cli``, for launchers that start Python modules."""

from hesper.cli.group import main

if __name__ == "__main__":
    main()
