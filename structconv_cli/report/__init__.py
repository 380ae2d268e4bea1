"""Results as tables for the terminal. No computation: what is shown is in the results."""
