"""The paper's tables and figures, each against this project: `python -m experiments`."""
