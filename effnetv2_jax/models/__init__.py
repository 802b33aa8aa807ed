"""The networks: tables in `specs.py`, what they share in `network.py`, one file per family."""
