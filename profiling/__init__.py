"""Where the time and the memory went: timers, peaks, and their report."""
