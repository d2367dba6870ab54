"""`python -m turret` is the `turret` command."""

from turret.cli.main import main

if __name__ == "__main__":
    main()
