"""Run the command line: python -m dsdistill."""

from dsdistill.cli import main

main()
