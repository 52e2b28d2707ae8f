"""Reports: what a finished run has to show."""
