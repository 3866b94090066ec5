"""`python -m lrq_export` is `lrq-export`."""

from lrq_export.cli import main

main()
