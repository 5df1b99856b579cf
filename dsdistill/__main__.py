"""python -m dsdistill"""

from dsdistill.cli import main

main()
