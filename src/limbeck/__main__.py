"""``python -m limbeck``, which is what ``torchrun -m limbeck`` runs."""

from limbeck.cli import main

if __name__ == "__main__":
    main()
