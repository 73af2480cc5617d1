"""The tests, as a package: what several of them use is imported as ``tests.<where it is>``."""
