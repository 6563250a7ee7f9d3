"""Run from a checkout: ``python cli.py build ...`` does what the installed ``mbq-export build ...`` does."""

from mbq_export.commands import main

if __name__ == "__main__":
    main()
