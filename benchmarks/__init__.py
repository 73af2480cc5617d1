"""What ``hvdloss bench`` runs on every rank: step times and all-reduces, peers side by side.

Every module is a script of its own: ``horovodrun -np 2 python -m hvdloss.benchmarks.step --help``.
"""
