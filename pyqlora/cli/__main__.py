"""`python -m pyqlora.cli`."""

from pyqlora.cli import main

main()
