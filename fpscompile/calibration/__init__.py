"""Parts of :func:`fpscompile.calibrate`: candidate windows, statistics of dense runs, the choice under a budget."""
