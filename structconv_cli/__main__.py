"""`python -m structconv_cli` is the same as `structconv`."""

from structconv_cli.cli import main

if __name__ == "__main__":
    main()
