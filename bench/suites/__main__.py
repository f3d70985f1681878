"""`python -m bench.suites` runs every suite; see `bench.suites.run`."""

from bench.suites.run import main

if __name__ == "__main__":
    main()
