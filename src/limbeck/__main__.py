"""`python -m limbeck`, which torchrun needs."""

from limbeck.cli import main

main()
