"""Where ``orchestrator`` begins. The stdio shim must answer at once, so it is reached without anything else."""

import sys


def main() -> None:
    """Run the command that ``sys.argv`` names and exit with its status."""
    if sys.argv[1:2] == ["mcp"]:
        from orchestrator import shim  # noqa: PLC0415  # only this command needs it

        sys.exit(shim.main(sys.argv[2:]))
    from orchestrator.cli import main as cli  # noqa: PLC0415  # click and all behind it

    cli.main()


if __name__ == "__main__":
    main()
