"""``python -m hvdloss.cli``: the same as the ``hvdloss`` command."""

from hvdloss.cli import main

if __name__ == "__main__":
    main()
