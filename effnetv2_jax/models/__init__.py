"""The networks: tables in `specs.py`, topology in `efficientnet.py`, one file per family."""
