"""Command-line tools, one file for each verb."""
