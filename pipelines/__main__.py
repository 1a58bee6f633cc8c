"""`python -m pipelines` is `bmojo`; both start here."""

from pipelines.engine.interrupts import leave_on_signals


def main() -> None:
    """Entry point. Signals are handled before anything large is imported, which takes a while."""
    leave_on_signals()
    from pipelines.cli.app import main as run_command

    run_command()


if __name__ == "__main__":
    main()
