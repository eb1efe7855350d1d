"""`python -m layercache`: the same as the `layercache` command."""

from layercache.cli import main

if __name__ == "__main__":
    main()
