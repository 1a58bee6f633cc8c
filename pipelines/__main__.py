"""`python -m pipelines` is `bmojo`."""

from pipelines.cli.app import main

if __name__ == "__main__":
    main()
