"""The wake benchmark: guests, the two systems, the run, the summary and the plot."""
