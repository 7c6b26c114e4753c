"""Report a training run: on a terminal, as lines, in files and as a plot."""
