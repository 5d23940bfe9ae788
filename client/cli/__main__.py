"""``python -m flightquant.client.cli``: the console script."""

from flightquant.client.cli import main

if __name__ == "__main__":
    main()
