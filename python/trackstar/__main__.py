"""``python -m trackstar``: the command line."""

from trackstar.cli import main

main()
