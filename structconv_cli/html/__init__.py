"""The report as one HTML page: what a run's files say, drawn and put in words. No computation."""
