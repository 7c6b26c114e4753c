"""What a run says of itself: on a screen, as lines, in files and as a plot."""
