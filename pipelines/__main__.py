"""`python -m pipelines` is `bmojo`."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
