"""`python -m varan.cli`."""

from . import main

main()
