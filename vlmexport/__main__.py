"""``python -m vlmexport`` is the command line."""

from vlmexport.cli.main import main

if __name__ == "__main__":
    main()
