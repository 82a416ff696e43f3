"""``python -m genssm`` is ``genssm``; and so ``torchrun … -m genssm`` starts it on many devices."""

from genssm.cli import main

if __name__ == "__main__":
    main()
