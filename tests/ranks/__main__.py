"""One rank: ``horovodrun --gloo -np 2 python -m tests.ranks torch_exact:uneven_batches``."""

from .inner import main

main()
